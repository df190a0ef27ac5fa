"""Mixtures of experts for training: the same function as ``operators.routed_experts``, sorted, balanced and counted.

    y = shared(x) + sum over the chosen e of  down_e( silu(gate_e(s_e x)) * up_e(s_e x) ),    s_e = sigmoid(logit_e)

Tokens are repeated for each expert they chose, scaled by its score, sorted by expert, multiplied in groups
(``grouped.py``), sorted back and summed. Sorting is a permutation and sums are dense, so that gradients do not depend
on the order in which a GPU happens to add. The router's gradient arrives through s.

Shapes: B batch, T tokens, D width, F expert width, E experts, k chosen experts, R = T · k rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....errors import HerdError
from ...config import TextConfig
from ...config.names import expected_tensors
from ...llama4.decoder import DecoderLayer, Experts, MixtureOfExperts
from ...llama4.model import Llama4
from ..dtensor import local_tensor
from ..recompute import recomputing
from .balancing import (
    bias_schedule,
    load_balancing_loss,
    rerouted_tokens,
    router_z_loss,
    tokens_per_expert,
    updated_bias,
)
from .grouped import GroupedProduct, in_autocast, inverse, offsets_of


@dataclass(frozen=True)
class ExpertOptions:
    """How experts are kept busy, see ``balancing.py``.

    Attributes:
        bias_rate: step of the selection bias per update, 0 for none. It is added to logits, whose spread it should
            match: 0.001 is what was published for scores between 0 and 1.
        bias_fade: share of the run, at its end, over which the bias is brought linearly to zero, 0 for none.
        balance_loss: factor of the load-balancing loss.
        z_loss: factor of the router z-loss.
    """

    bias_rate: float = 1e-3
    bias_fade: float = 0.2
    balance_loss: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.bias_fade <= 1:
            raise HerdError(f"bias_fade is {self.bias_fade}, it must be within 0 and 1")


Compute = Callable[[Tensor, Tensor], Tensor]
"""Rows sorted by expert [R, D] and how many each expert has, int64, to their outputs [R, D]."""


class Dispatch(Protocol):
    """Where rows are computed: on this rank, or on those that own their experts (``expert_parallel.py``)."""

    def __call__(self, compute: Compute, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Outputs of all rows, [R, D], in their order.

        Args:
            compute: the experts of this rank.
            x_RD: rows of all experts, sorted by expert.
            counts_E: int64, rows of each expert.
        """


def local_dispatch(compute: Compute, x_RD: Tensor, counts_E: Tensor) -> Tensor:
    """All experts are on this rank."""
    return compute(x_RD, counts_E)


class GroupedExperts(Experts):
    """``Experts`` computed in groups. Names, shapes and function are the same.

    Attributes:
        dispatch: where rows are computed; with parameters that are spread over ranks, ``compute`` has this rank's.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.gate_up_product: nn.Module = GroupedProduct()
        self.down_product: nn.Module = GroupedProduct()
        self.dispatch: Dispatch = local_dispatch

    def forward(self, x_TD: Tensor, logits_TE: Tensor, experts_Tk: Tensor | None = None) -> Tensor:
        """Tokens and router logits to the sum of the chosen experts' outputs.

        Args:
            x_TD: tokens.
            logits_TE: router logits, without any bias: they are the scores.
            experts_Tk: the chosen experts, None for those with the highest logits.
        """
        if experts_Tk is None:
            experts_Tk = logits_TE.topk(self.top_k, dim=-1).indices
        scores_Tk = torch.sigmoid(precise(logits_TE.gather(1, experts_Tk))).type_as(x_TD)
        order_R = experts_Tk.flatten().argsort(stable=True)
        scaled_RD, = in_autocast((x_TD[:, None] * scores_Tk[..., None]).flatten(0, 1).index_select(0, order_R))
        y_RD = self.dispatch(self.compute, scaled_RD, tokens_per_expert(experts_Tk, logits_TE.shape[1]))
        return y_RD.index_select(0, inverse(order_R)).unflatten(0, experts_Tk.shape).sum(1)

    def compute(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Scaled rows, sorted by expert, through the experts of this rank, [R, D]."""
        offsets_E = offsets_of(counts_E)
        gate, up = self.gate_up_product(x_RD, local_tensor(self.gate_up_proj), offsets_E).chunk(2, dim=-1)
        return self.down_product(functional.silu(gate) * up, local_tensor(self.down_proj), offsets_E)


class BalancedMixture(MixtureOfExperts):
    """``MixtureOfExperts`` with a router in float32, a selection bias in training mode, and counted tokens.

    Attributes:
        selection_bias: [E], added to logits to choose experts; a checkpoint for serving does not hold it.
        acting: share of the bias that is added, see ``fade_selection_biases``.
        counts: int64 [E], tokens that each expert got in training mode since the last reset.
        moved: int64, how many tokens went elsewhere than without the bias.
        auxiliary: weighted losses of the last forward pass, None when they are off or were taken.
    """

    selection_bias: Tensor
    counts: Tensor
    moved: Tensor

    def __init__(self, config: TextConfig, options: ExpertOptions) -> None:
        super().__init__(config)
        self.experts: GroupedExperts = GroupedExperts(config)
        self.options = options
        self.acting = 1.0
        self.auxiliary: Tensor | None = None
        self.register_buffer("selection_bias", torch.zeros(config.num_experts))
        self.register_buffer("counts", torch.zeros(config.num_experts, dtype=torch.int64))
        self.register_buffer("moved", torch.zeros((), dtype=torch.int64))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Shared plus routed."""
        x_TD = x_BTD.flatten(0, 1)
        logits_TE = self.route(x_TD)
        experts_Tk = self.choose(logits_TE)
        if self.training:
            self._note(logits_TE, experts_Tk)
        return (self.shared_expert(x_TD) + self.experts(x_TD, logits_TE, experts_Tk)).view_as(x_BTD)

    def route(self, x_TD: Tensor) -> Tensor:
        """Router logits in float32 whatever the model computes in: an error there is another expert."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return functional.linear(precise(x_TD), precise(self.router.weight))

    def choose(self, logits_TE: Tensor) -> Tensor:
        """Experts of each token: the highest logits, in training mode after the bias."""
        biased_TE = logits_TE + self.acting * self.selection_bias if self.training else logits_TE
        return biased_TE.detach().topk(self.experts.top_k, dim=-1).indices

    def _note(self, logits_TE: Tensor, experts_Tk: Tensor) -> None:
        auxiliary = self._auxiliary(logits_TE, experts_Tk)
        if recomputing():
            return
        self.auxiliary = auxiliary
        with torch.no_grad():
            self.counts += tokens_per_expert(experts_Tk, len(self.counts))
            self.moved += rerouted_tokens(logits_TE.topk(self.experts.top_k, dim=-1).indices, experts_Tk)

    def _auxiliary(self, logits_TE: Tensor, experts_Tk: Tensor) -> Tensor | None:
        options, losses = self.options, []
        if options.balance_loss:
            losses.append(options.balance_loss * load_balancing_loss(logits_TE, experts_Tk))
        if options.z_loss:
            losses.append(options.z_loss * router_z_loss(logits_TE))
        return torch.stack(losses).sum() if losses else None

    @torch.no_grad()
    def rebalance(self, counts_E: Tensor) -> None:
        """Move the bias against an uneven load, and count from zero again."""
        self.selection_bias.copy_(updated_bias(self.selection_bias, counts_E, self.options.bias_rate))
        self.counts.zero_()
        self.moved.zero_()


def precise(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def prepare_for_training(model: Llama4, options: ExpertOptions | None = None) -> Llama4:
    """Replace every mixture of experts, in place, by one that trains. Parameters stay the same objects and names."""
    for layer in model.modules():
        if isinstance(layer, DecoderLayer) and type(layer.feed_forward) is MixtureOfExperts:
            layer.feed_forward = _trainable(layer.feed_forward, model.config.text, options or ExpertOptions())
    return model


def _trainable(plain: MixtureOfExperts, config: TextConfig, options: ExpertOptions) -> BalancedMixture:
    with torch.device("meta"):
        mixture = BalancedMixture(config, options)
    for name, buffer in list(mixture.named_buffers()):
        mixture.register_buffer(name, torch.zeros_like(buffer, device=plain.router.weight.device))
    mixture.router, mixture.shared_expert = plain.router, plain.shared_expert
    mixture.experts.gate_up_proj, mixture.experts.down_proj = plain.experts.gate_up_proj, plain.experts.down_proj
    return mixture.train(plain.training)


def plain_state_dict(model: Llama4) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds, by canonical name: no biases, counts or histories of training."""
    found = {canonical_name(name): tensor for name, tensor in model.state_dict().items()}
    return {name: found[name] for name in expected_tensors(model.config)}


def canonical_name(name: str) -> str:
    """The name in checkpoints of a parameter of ``Llama4``."""
    return name.removeprefix("decoder.").removeprefix("vision.")


def mixtures(model: nn.Module) -> Iterator[tuple[str, BalancedMixture]]:
    """Prepared mixtures and their canonical names, ``layers.1.feed_forward``."""
    return ((canonical_name(name), part) for name, part in model.named_modules() if isinstance(part, BalancedMixture))


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """The sum of the weighted auxiliary losses of the last forward pass, each a mean over tokens; taken once."""
    losses = []
    for _, mixture in mixtures(model):
        if mixture.auxiliary is not None:
            losses.append(mixture.auxiliary)
            mixture.auxiliary = None
    return torch.stack(losses).sum() if losses else None


def fade_selection_biases(model: nn.Module, step: int, steps: int) -> None:
    """Before a step, counted from 0, of so many: let every bias act as much as it should by then."""
    for _, mixture in mixtures(model):
        mixture.acting = bias_schedule(step, steps, mixture.options.bias_fade)


class Load(NamedTuple):
    """What a mixture had to do since the last update, over all ranks.

    Attributes:
        counts_E: int64 [E], tokens that each expert got.
        moved: share of tokens that the bias sent elsewhere.
    """

    counts_E: Tensor
    moved: float


def update_selection_biases(
    model: nn.Module, total: Callable[[Tensor], Tensor] = lambda counts: counts
) -> dict[str, Load]:
    """Once per step: move every bias by the load since the last update, reset the counts, and say what they were.

    Args:
        model: prepared.
        total: sums a tensor over ranks; called once, for all layers.
    """
    found = dict(mixtures(model))
    if not found:
        return {}
    seen_LN = total(torch.stack([torch.cat((mixture.counts, mixture.moved[None])) for mixture in found.values()]))
    loads = {}
    for (name, mixture), seen_N in zip(found.items(), seen_LN, strict=True):
        counts_E, moved = seen_N[:-1], seen_N[-1]
        tokens = int(counts_E.sum()) // mixture.experts.top_k
        loads[name] = Load(counts_E, int(moved) / max(1, tokens))
        mixture.rebalance(counts_E)
    return loads
