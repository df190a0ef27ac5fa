"""Experts on several ranks: rows travel to the rank that owns their expert, and their outputs travel back.

Each of G ranks holds L = E / G experts, rank g those from g · L on, and has rows of its own, sorted by expert and so by
owner. Two exchanges carry them, with as many rows for each rank as there are: nothing is padded or dropped, and a rank
may get all of them or none.

    counts        [G, L] of mine to each rank        ->  [G, L] of each rank's rows for mine
    rows          sorted by (owner, expert)          ->  sorted by (source, expert), then by expert for the product
    outputs       the same way back

The gradient of an exchange is the exchange back. A rank's experts get gradients from the rows of all G ranks; FSDP2,
which spreads them over replicas only, must still divide by all data ranks (``sharding.py``).

Shapes: E experts, G ranks, L experts of a rank, R rows of this rank, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..moe.experts import Compute
from ..moe.grouped import inverse


class AllToAll:
    """Computes rows on the ranks that own their experts.

    Args:
        group: the G ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, compute: Compute, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See ``experts.Dispatch``."""
        mine_GL = counts_E.unflatten(0, (self.group.size(), -1))
        theirs_GL = torch.empty_like(mine_GL)
        dist.all_to_all_single(theirs_GL, mine_GL, group=self.group)
        sent, received = mine_GL.sum(1).tolist(), theirs_GL.sum(1).tolist()
        order = by_expert(theirs_GL, sum(received))
        y = compute(exchanged(x_RD, sent, received, self.group).index_select(0, order), theirs_GL.sum(0))
        return exchanged(y.index_select(0, inverse(order)), received, sent, self.group)


def by_expert(counts_GL: Tensor, rows: int) -> Tensor:
    """Places of rows that are sorted by (source, expert), in the order (expert, source); int64 [rows]."""
    sources, experts = counts_GL.shape
    expert_GL = torch.arange(experts, device=counts_GL.device).expand(sources, -1)
    return expert_GL.flatten().repeat_interleave(counts_GL.flatten(), output_size=rows).argsort(stable=True)


def exchanged(x_RD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows from all ranks, in the order of ranks, differentiable.

    Args:
        x_RD: rows for the first rank, then for the second, and so on.
        sent: how many for each rank.
        received: how many from each rank.
        group: the ranks.
    """
    return _Exchange.apply(x_RD, sent, received, group)  # type: ignore[no-untyped-call]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.back = received, sent, group
        y_RD = x_RD.new_empty(sum(received), *x_RD.shape[1:])
        dist.all_to_all_single(y_RD, x_RD.contiguous(), received, sent, group=group)
        return y_RD

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        return exchanged(dy_RD, *ctx.back), None, None, None
