"""Those whose training step is measured (``training.py``): the same function and weights, computed in different ways.

The weights are ours for all. Those that transformers begins with send most tokens of a step to a few of 128 experts,
and products with the rest cost nothing.

* ``herdgraph``, and ``herdgraph, compiled``: its layers by ``torch.compile``, but for experts.
* ``transformers``: its Llama 4, which computes every expert on every token. Attention is ``sdpa``, as with all.
* ``transformers, grouped``: transformers has experts in groups (``experts_implementation="grouped_mm"``), but not for
  its Llama 4; here its function for them is put into its Llama 4.
* ``torchtitan's layer``: the mixtures of ``herdgraph`` are torchtitan's (0.3). They weight what leaves an expert,
  another function at the same cost, and compute experts in bfloat16 whatever the model is in. Here it is float32;
  ``torchtitan's layer, bf16`` is as it comes, at the mercy of a CPU's instructions for bfloat16.

torchtitan is not among the requirements: ``pip install --no-deps torchtitan spmd_types torch_checkpointing torchdata
tyro einops triton``, best in an environment of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from herdgraph.model.checkpoint.names import stored_name
from herdgraph.model.config import HerdConfig, TextConfig, to_hf
from herdgraph.model.llama4.initialization import initialize
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.training.data import IGNORED, Batch
from herdgraph.model.training.moe.experts import GroupedExperts, prepare_for_training
from herdgraph.model.training.objective import NextToken
from herdgraph.model.training.optim import OptimizerOptions, optimizer_for

from .peers import let_torchvision_import

Loss = Callable[[], Tensor]
Contestant = Callable[[HerdConfig, Tensor], tuple[Loss, torch.optim.Optimizer]]
"""Configuration and token ids to the loss of a step and what makes it."""


def ours(config: HerdConfig) -> Llama4:
    """The model, initialized."""
    return prepare_for_training(initialize(Llama4(config))).train()


def herdgraph(config: HerdConfig, ids_BT: Tensor, change: Callable[[Llama4], None] = lambda model: None) -> Any:
    """Ours, changed or as it is."""
    model = ours(config)
    change(model)
    labels_BT = torch.cat([ids_BT[:, 1:], torch.full((len(ids_BT), 1), IGNORED)], 1)
    batch, objective = Batch(ids_BT, labels_BT, torch.zeros_like(ids_BT), None), NextToken()
    count = (labels_BT != IGNORED).sum()
    return lambda: objective(model, batch, 0)[0] / count, optimizer_for(model, OptimizerOptions())


def compiled(config: HerdConfig, ids_BT: Tensor) -> Any:
    """Ours, every layer compiled but for what depends on the data: experts, and the lengths of documents."""
    GroupedExperts.forward = torch.compiler.disable(GroupedExperts.forward)  # type: ignore[method-assign]

    def change(model: Llama4) -> None:
        for layer in model.decoder.layers:
            layer.compile(dynamic=False)

    return herdgraph(config, ids_BT, change)


def transformers(config: HerdConfig, ids_BT: Tensor, *, grouped: bool = False) -> Any:
    """Llama 4 of transformers."""
    let_torchvision_import()
    from transformers import Llama4ForCausalLM, Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    raw = {key: value for key, value in to_hf(config).items() if key not in ("architectures", "model_type")}
    model: Any = Llama4ForCausalLM(Llama4TextConfig(**raw))  # ``sdpa``, as is their default
    model.load_state_dict({stored_name(name.removeprefix("decoder."), config): value
                           for name, value in ours(config).named_parameters()})
    model = model.float().train()
    for part in model.modules():
        if grouped and isinstance(part, Llama4TextMoe):
            _group(part)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    return lambda: model(ids_BT, labels=ids_BT, use_cache=False).loss, optimizer


def _group(mixture: Any) -> None:
    """Let a mixture of transformers' Llama 4 use the grouped experts that transformers has for other models."""
    from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward

    for name, value in {"has_gate": True, "has_bias": False, "has_post_expert_norm": False, "is_transposed": True,
                        "_is_expert_parallel": False, "_apply_gate": MethodType(_default_apply_gate, mixture.experts),
                        }.items():  # what their decorator gives an experts' class
        setattr(mixture.experts, name, value)

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = hidden_states.reshape(-1, self.hidden_dim)
        logits_TE = functional.linear(x_TD, self.router.weight)
        value_T1, expert_T1 = logits_TE.topk(self.top_k, dim=1)
        # Llama 4 scales what enters an expert (of one per token, as in all its models), so nothing is left to weight.
        routed_TD = grouped_mm_experts_forward(
            self.experts, x_TD * value_T1.sigmoid(), expert_T1, torch.ones_like(value_T1))
        return self.shared_expert(x_TD) + routed_TD, logits_TE

    mixture.forward = MethodType(forward, mixture)


def torchtitan(config: HerdConfig, ids_BT: Tensor, *, bfloat16: bool = False) -> Any:
    """Our model with torchtitan's mixtures."""

    def change(model: Llama4) -> None:
        for layer in model.decoder.layers:
            layer.feed_forward = _titan_mixture(config.text, layer.feed_forward, bfloat16)

    return herdgraph(config, ids_BT, change)


def _titan_mixture(text: TextConfig, mixture_of_ours: Any, bfloat16: bool) -> nn.Module:
    from torchtitan.models.common import feed_forward, moe
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    class Float32Experts(moe.GroupedExperts):  # type: ignore[misc]
        """As torchtitan's, without rounding to bfloat16."""

        def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
            """See ``moe.GroupedExperts``."""
            def product(x: Tensor, weight: Tensor) -> Tensor:
                return self._grouped_mm(A=x, B_t=weight.transpose(-2, -1), offs=offsets)

            offsets = torch.cumsum(counts_E, dim=0, dtype=torch.int32)
            inner = functional.silu(product(x_RD, self.w1_EFD)) * product(x_RD, self.w3_EFD)
            return product(inner, self.w2_EDF)

    def linear(inputs: int, outputs: int) -> Any:
        return Linear.Config(in_features=inputs, out_features=outputs, bias=False)

    width, inner, experts = text.hidden_size, text.expert_size, text.num_experts
    mixture = moe.MoE.Config(
        num_experts=experts,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(dim=width, hidden_dim=inner, num_experts=experts),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=experts, top_k=text.top_k)),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=experts, gate=linear(width, experts), top_k=text.top_k, score_func="sigmoid"),
        shared_experts=feed_forward.FeedForward.Config(
            w1=linear(width, inner), w2=linear(inner, width), w3=linear(width, inner)),
    ).build()
    if not bfloat16:
        mixture.routed_experts.inner_experts.__class__ = Float32Experts
    _give_weights(mixture, mixture_of_ours)
    return mixture


@torch.no_grad()
def _give_weights(mixture: Any, of_ours: Any) -> None:
    """Copy the weights of one of our mixtures into one of torchtitan's."""
    experts, shared = mixture.routed_experts.inner_experts, mixture.shared_experts
    gate_EDF, up_EDF = of_ours.experts.gate_up_proj.chunk(2, dim=-1)
    for target, weight in (
        (mixture.router.gate.weight, of_ours.router.weight),
        (experts.w1_EFD, gate_EDF.mT), (experts.w3_EFD, up_EDF.mT), (experts.w2_EDF, of_ours.experts.down_proj.mT),
        (shared.w1.weight, of_ours.shared_expert.gate_proj.weight),
        (shared.w3.weight, of_ours.shared_expert.up_proj.weight),
        (shared.w2.weight, of_ours.shared_expert.down_proj.weight),
    ):
        target.copy_(weight)


OURS = "herdgraph"
CONTESTANTS: Mapping[str, Contestant] = {
    OURS: herdgraph,
    "herdgraph, compiled": compiled,
    "transformers": transformers,
    "transformers, grouped": lambda config, ids_BT: transformers(config, ids_BT, grouped=True),
    "torchtitan's layer": torchtitan,
    "torchtitan's layer, bf16": lambda config, ids_BT: torchtitan(config, ids_BT, bfloat16=True),
}
