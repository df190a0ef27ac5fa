"""The same random weights twice: transformers' Llama 4 and ours."""

from __future__ import annotations

import torch

from herdgraph.model.checkpoint.names import canonical_name
from herdgraph.model.config import HerdConfig
from herdgraph.model.llama4.model import Llama4
from support import herds

Gradients = dict[str, torch.Tensor]


def twins(config: HerdConfig, seed: int = 0) -> tuple[Llama4, torch.nn.Module]:
    """Ours and theirs, float32."""
    theirs, ours = herds.reference(config, seed), Llama4(config)
    weights = {canonical_name(name): value for name, value in theirs.state_dict().items()}
    own = {name: weights[_canonical(name)].clone() for name in ours.state_dict()}
    ours.load_state_dict(own, strict=True)
    return ours.eval(), theirs


def _canonical(name: str) -> str:
    return name.removeprefix("decoder.").removeprefix("vision.")


def gradients(model: torch.nn.Module) -> Gradients:
    """Gradients by canonical name, of either."""
    return {canonical_name(_canonical(name)): parameter.grad for name, parameter in model.named_parameters()
            if parameter.grad is not None}
