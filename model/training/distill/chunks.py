"""Functions of logits, a few rows at a time, computed again in the backward pass.

Shapes: N tokens, M chosen tokens, X width of a row (logits or hidden state).

With a vocabulary of 202,048 ids, the float32 intermediates of a loss are far larger than the model's activations: 8,192
tokens make 6.6 GB of each. Only one chunk of them exists here at a time. The backward pass computes a chunk's values
again and writes its gradient straight into the one buffer that autograd needs anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ELEMENTS = 1 << 21
"""Logits in a chunk: 8 MB in float32, measured fastest on CPUs and ample for a GPU's launch latency."""

RowFunction = Callable[..., tuple[Tensor, ...]]
"""Takes rows [m, X], their indices [m] and the shared tensors; gives tensors [m]."""


def rows_for(vocabulary: int) -> int:
    """Rows of logits in a chunk."""
    return max(1, _ELEMENTS // vocabulary)


def collect(function: Callable[[Tensor], tuple[Tensor, ...]], index_M: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Results [M] of a function that takes some of the indices at a time."""
    results: list[Tensor] = []
    for begin in range(0, max(1, len(index_M)), rows):
        parts = function(index_M[begin : begin + rows])
        # Small results that stay between large ones that go would keep the allocator from using their places again.
        results = results or [part.new_empty(len(index_M)) for part in parts]
        for whole, part in zip(results, parts, strict=True):
            whole[begin : begin + rows] = part
    return tuple(results)


def by_chunks(function: RowFunction, x_NX: Tensor, index_M: Tensor, *shared: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Apply a function to the chosen rows, chunk by chunk.

    Args:
        function: must give the same when it is called again. Integer results carry no gradient.
        x_NX: gets a gradient, zero where no row was chosen.
        index_M: rows of ``x_NX``, each once.
        shared: given to every call, such as the head's weight; get gradients too.
        rows: of one chunk.

    Returns:
        The function's results for all chosen rows, [M] each.
    """
    apply: Any = _ByChunks.apply
    return tuple(apply(function, rows, index_M, x_NX, *shared))


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: RowFunction, rows: int, index_M: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        x_NX, *shared = inputs
        ctx.function, ctx.rows = function, rows
        ctx.save_for_backward(index_M, *inputs)
        kind = x_NX.device.type
        ctx.autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind),
                        "enabled": torch.is_autocast_enabled(kind)}
        results = collect(lambda piece: function(x_NX[piece], piece, *shared), index_M, rows)
        ctx.mark_non_differentiable(*(result for result in results if not result.is_floating_point()))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        index_M, *inputs = ctx.saved_tensors
        wanted = [at for at, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        found = {at: torch.zeros_like(inputs[at]) for at in wanted}
        for begin in range(0, len(index_M), ctx.rows):
            chosen = slice(begin, begin + ctx.rows)
            piece = index_M[chosen]
            leaves = [inputs[0][piece], *inputs[1:]]
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                leaves = [leaf.detach().requires_grad_(at in found) for at, leaf in enumerate(leaves)]
                results = ctx.function(leaves[0], piece, *leaves[1:])
            pairs = [(r, g[chosen]) for r, g in zip(results, gradients, strict=True) if r.requires_grad]
            outputs, above = zip(*pairs, strict=True)
            parts = torch.autograd.grad(outputs, [leaves[at] for at in wanted], above)
            for at, part in zip(wanted, parts, strict=True):
                if at == 0:
                    found[0][piece] = part
                else:
                    found[at] += part
        return None, None, None, *(found.get(at) for at in range(len(inputs)))
