"""Optimiser, learning-rate schedules and averaged weights.

Schedules give a factor on the learning rate, after a linear warm-up from 0 over W steps of S:

    cosine   f + (1 - f) (1 + cos(pi (s - W) / (S - W))) / 2         Loshchilov & Hutter 2017
    wsd      1, then linearly down to f over the last share of the steps    warm-up, stable, decay (Hu et al. 2024)

Learning rates by layer, in the spirit of MetaP, whose recipe Meta did not publish: what Tensor Programs V (Yang et al.
2022, table 3) derives for Adam. With B the base width, at which a rate was found, and D the width of the decoder:

    decoder's matrices, routers, head        B / D    Adam moves every element alike, so sums over D move D times as far
    final norm before a tied head            B / D    it stands for the factor on the logits (``initialization.py``)
    embeddings, other norms, biases          1
    image tower, K inputs of a matrix        min(1, B / K)    its width is its own, and is not the one that was tuned

so that a rate found on a narrow model holds for a wide one. Weight decay is divided by the same share: a step takes as
much from a weight as before (Wang & Aitchison 2024, arXiv 2405.13698).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import HerdError
from ..config import TextConfig
from ..llama4.model import Llama4
from .dtensor import full_tensor


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and its schedule.

    Attributes:
        learning_rate: the highest learning rate of the schedule.
        betas: decay rates of AdamW's two moments.
        weight_decay: of matrices; norms, biases and embeddings have none.
        clip: largest norm of all gradients together, 0 for no limit.
        warmup: steps from 0 to the highest rate.
        schedule: after the warm-up: cosine; wsd, constant and then a linear decay; or constant.
        final: learning rate at the end, as a share of the highest.
        decay: share of the steps in which wsd decays.
        base_width: hidden size at which the learning rate was found, which then holds for this model; None for the same
            rate in every layer.
        ema: decay per step of exponentially averaged weights, 0 for none.
    """

    learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: int = 50
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    final: float = 0.1
    decay: float = 0.2
    base_width: int | None = None
    ema: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "clip", "warmup"):
            self._require(name, getattr(self, name), math.inf)
        for name in ("final", "decay", "ema"):
            self._require(name, getattr(self, name), 1)
        for beta in self.betas:
            self._require("betas", beta, 1)
        if self.base_width is not None and self.base_width < 1:
            raise HerdError(f"optimizer.base_width is {self.base_width}, it must be at least 1")

    def _require(self, name: str, value: float, most: float) -> None:
        forever = value == 1 and name in ("betas", "ema")  # an average that never moves
        if not 0 <= value <= most or math.isinf(value) or forever:
            bounds = "at least 0, and finite" if most == math.inf else "from 0 to 1" + ", and not 1" * forever
            raise HerdError(f"optimizer.{name} is {value}, it must be {bounds}")


def learning_rate_factor(step: int, steps: int, options: OptimizerOptions) -> float:
    """The factor on the learning rate in a step, counted from 0, of so many."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "cosine":
        done = (step - options.warmup) / max(1, steps - options.warmup)
        return options.final + (1 - options.final) * (1 + math.cos(math.pi * min(1.0, done))) / 2
    left = (steps - step) / max(1.0, options.decay * steps)
    return options.final + (1 - options.final) * min(1.0, left)


def optimizer_for(model: Llama4, options: OptimizerOptions) -> torch.optim.AdamW:
    """AdamW with one group per rate and decay; each group's ``scale`` is its layer's share of the rate."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = layer_scale(name, parameter, model.config.text, options.base_width), decays(name, parameter)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "scale": scale, "weight_decay": options.weight_decay / scale if decaying else 0.0}
         for (scale, decaying), parameters in groups.items()],
        lr=options.learning_rate, betas=options.betas, fused=True,
    )


def layer_scale(name: str, parameter: Tensor, text: TextConfig, base_width: int | None) -> float:
    """A parameter's share of the learning rate.

    Args:
        name: in ``Llama4``.
        parameter: its shape counts.
        text: configuration of the decoder.
        base_width: see ``OptimizerOptions``.
    """
    damps_logits = text.tie_word_embeddings and name == "decoder.norm.weight"
    if base_width is None or (_is_one_sided(name, parameter) and not damps_logits):
        return 1.0
    if name.startswith("vision."):
        return min(1.0, base_width / parameter.shape[1])
    return base_width / text.hidden_size


def _is_one_sided(name: str, parameter: Tensor) -> bool:
    """Whether a parameter sums over no width: norms, biases, and embeddings of words, patches and positions."""
    return parameter.ndim < 2 or "embed" in name


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay pulls a parameter to zero."""
    return parameter.ndim >= 2 and "embed" not in name


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of a rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> float:
    """Scale all gradients so that their norm together stays within a limit; the norm before.

    Args:
        parameters: whose gradients; they may be spread over ranks, not all over the same.
        limit: 0 for none.
    """
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = [full_tensor(nn.utils.get_total_norm([parameter.grad for parameter in found if parameter.grad is not None]))
             for found in by_mesh.values()]
    norm = torch.stack(norms).norm() if norms else torch.zeros(())
    for found in by_mesh.values():
        nn.utils.clip_grads_with_norm_(found, limit or math.inf, norm)
    return float(norm)


class AveragedWeights:
    """Exponential moving average of a model's parameters, in float32.

    Args:
        model: whose.
        decay: share of the average that stays in a step; early steps use (1 + s) / (10 + s) when that is less.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.average = {name: value.detach().float().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the present parameters."""
        keep = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for name, value in model.named_parameters():
            self.average[name].lerp_(value.detach().float(), 1 - keep)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and averages."""
        yield from self.average.items()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"steps": torch.tensor(self.steps), "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        self.steps = int(state["steps"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)
