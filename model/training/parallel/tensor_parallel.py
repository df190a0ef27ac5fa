"""Layers on several ranks that have the same tokens: heads, inner widths and experts are shared, sums are joined.

    y = W2 f(W1 x) = sum over ranks t of  W2[:, t] f(W1[t] x)      f works on each head, or each inner element

The first matrix is split by outputs, the second by inputs (Megatron, Shoeybi et al. 2019, arXiv 1909.08053), through
DTensor: what enters is whole and its gradient is summed over ranks, what leaves is summed and its gradient is whole.
So everything between, norms, router, residuals, has equal values and equal gradients on all tensor ranks. The head is
split by vocabulary and its logits are joined.

Routed experts are not cut but dealt: a rank computes the rows of its own experts, and the sum joins the rows. Rows were
scaled by the router before, hence the router's gradient is whole as well.

Shapes: E experts, G expert ranks, S tensor ranks, L experts of a rank, R rows sorted by expert, D width.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from ...llama4.decoder import Attention, FeedForward
from ...llama4.model import Llama4
from ...llama4.vision import AdapterMLP, VisionAttention, VisionMLP
from ..moe.experts import Compute, Dispatch

_Styles = dict[str, type[ColwiseParallel] | type[RowwiseParallel]]

_BY_OUTPUTS, _BY_INPUTS = ColwiseParallel, RowwiseParallel
_ATTENTION: _Styles = {"q_proj": _BY_OUTPUTS, "k_proj": _BY_OUTPUTS, "v_proj": _BY_OUTPUTS, "o_proj": _BY_INPUTS}
_SWIGLU: _Styles = {"gate_proj": _BY_OUTPUTS, "up_proj": _BY_OUTPUTS, "down_proj": _BY_INPUTS}
_MLP: _Styles = {"fc1": _BY_OUTPUTS, "fc2": _BY_INPUTS}
_STYLES: dict[type[nn.Module], _Styles] = {
    Attention: _ATTENTION, VisionAttention: _ATTENTION, FeedForward: _SWIGLU, VisionMLP: _MLP, AdapterMLP: _MLP,
}
_ARGUMENTS: dict[type[nn.Module], int] = {Attention: 3, VisionAttention: 3, FeedForward: 1}
"""Of modules in which several layers read the first argument: its gradient is summed over ranks once for all."""


def share_layers(model: Llama4, mesh: DeviceMesh) -> None:
    """Split all layers but the routed experts, in place, among the ranks of a mesh with one axis."""
    for part in list(model.modules()):
        styles = _STYLES.get(type(part))
        if styles is None:
            continue
        if arguments := _ARGUMENTS.get(type(part)):
            layouts = (Replicate(), *[None] * (arguments - 1))
            parallelize_module(part, mesh, PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts))
        for name, style in styles.items():
            _split(part.get_submodule(name), mesh, style())
        for heads in {"num_heads", "kv_heads"} & set(vars(part)):
            setattr(part, heads, getattr(part, heads) // mesh.size())
    if not model.config.text.tie_word_embeddings:
        _split(model.decoder.lm_head, mesh, ColwiseParallel(output_layouts=Replicate()))
        # The logits are a view of what was joined; nothing writes into them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _split(linear: nn.Module, mesh: DeviceMesh, style: ParallelStyle) -> None:
    """Split a linear layer, but not what FP8 remembers of its inputs, which torch would take for a layer as well."""
    memory = dict(linear.named_children())
    for name in memory:
        delattr(linear, name)
    parallelize_module(linear, mesh, style, src_data_rank=None)
    for name, part in memory.items():
        linear.add_module(name, part)


class ExpertTensorParallelDispatch:
    """Computes on each tensor rank the rows of its own experts, and joins them.

    Args:
        inner: where those are computed.
        mesh: the S tensor ranks.
        expert_ranks: G; rank g deals the experts from g · S · L on to its tensor ranks, L to each.
    """

    def __init__(self, inner: Dispatch, mesh: DeviceMesh, expert_ranks: int) -> None:
        self.inner, self.mesh, self.expert_ranks = inner, mesh, expert_ranks

    def __call__(self, compute: Compute, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See ``experts.Dispatch``."""
        mine_E = torch.zeros_like(counts_E, dtype=torch.bool)
        mine_E.view(self.expert_ranks, self.mesh.size(), -1)[:, self.mesh.get_local_rank()] = True
        rows = mine_E.repeat_interleave(counts_E, output_size=len(x_RD)).nonzero().squeeze(1)
        y = self.inner(compute, _summed_gradient(x_RD, self.mesh).index_select(0, rows), counts_E[mine_E])
        return _summed(y.new_zeros(x_RD.shape[0], y.shape[1]).index_copy(0, rows, y), self.mesh)


def _summed_gradient(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same values, equal on all ranks; their gradient is summed over ranks."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over ranks; its gradient, equal on all ranks, is handed on."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()
