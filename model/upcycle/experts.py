"""Turning one dense feed-forward into a shared expert and routed experts without changing what it computes.

D is the width, F the dense feed-forward width, E the number of experts. The dense layer is a sum over its F neurons,

    ffn(x) = sum_n  silu(g_n · x) (u_n · x) d_n

and a Llama 4 mixture with one chosen expert e, whose score multiplies the *input*, is

    moe(x) = shared(x) + down_e( silu(gate_e(s x)) * up_e(s x) ),   s = sigmoid(r_e · x),  e = argmax_j r_j · x

**shared** (expert width F): shared = ffn, and every down_e = 0. The routed term vanishes whatever the router does, so
moe = ffn exactly. Router, gates and ups are random: the first gradients reach down_e, which differ from there on.

**split** (expert width F/2): the neurons are divided, shared = neurons [0, F/2), every expert = neurons [F/2, F). If
s = 1, moe = ffn whichever expert is chosen; so the router has to be decided on every token. Its rows come in pairs
(+r, -r), so the largest logit is the largest |r · x| of E/2 directions and never negative. x is a unit-RMS vector
times the norm's weights w, hence for a unit vector r drawn at random r · x has the standard deviation rms(w): rows of
norm SHARPNESS / rms(w) give logits of standard deviation SHARPNESS. The routed half of a token is off by about
1 - s = exp(-|r · x|), and only tokens within a few units of every hyperplane r · x = 0 notice.

**drop** (Drop-Upcycling, arXiv 2502.19261): a share of every expert's neurons in split mode is drawn anew, others for
each expert, with the mean and deviation of the dense weights. It costs some of the function and lets experts differ.

A sharper router keeps more and learns less, as its gradient has the factor s (1 - s). Measured on SmolLM2-135M-Instruct
with E = 4 in float32, 222 tokens of English (KL in nats per token, at 100 up to 1.6e-4 for other seeds):

    SHARPNESS             10       30       100      300      1000
    KL(dense || split)    1.8e-2   1.4e-3   3.0e-5   1.4e-8   < 1e-8
    mean s (1 - s)        2.1e-2   2.7e-3   2.3e-4   7.9e-6   6.1e-10

100 is the smallest of them that costs no more than rounding the weights to bfloat16 (KL 4.9e-5) usually does; 10 is
for models that will be trained on, as their routers can still learn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ...errors import HerdError

Mode = Literal["shared", "split"]

SHARPNESS = 100.0
"""Standard deviation of a router logit in split mode; see the table above."""


@dataclass(frozen=True)
class DenseFeedForward:
    """The float32 weights of one dense feed-forward and of the norm before it.

    Attributes:
        gate: rows g_n, [F, D].
        up: rows u_n, [F, D].
        down: columns d_n, [D, F].
        norm: weights w of the norm that makes x, [D].
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    norm: Tensor


def expert_size(mode: str, experts: int, ffn_size: int) -> int:
    """Width of the shared and of every routed expert.

    Raises:
        HerdError: unknown mode, no expert, or an odd number of experts or neurons in split mode.
    """
    if mode not in get_args(Mode):
        raise HerdError(f"mode is {mode!r}, choose one of {', '.join(get_args(Mode))}")
    if experts < 1:
        raise HerdError(f"{experts} experts were asked for, at least 1 is needed")
    if mode == "shared":
        return ffn_size
    if experts % 2:
        raise HerdError(f"{experts} experts were asked for, split mode pairs them: give an even number")
    if ffn_size % 2:
        raise HerdError(f"the feed-forward has {ffn_size} neurons, split mode halves them: use --mode shared")
    return ffn_size // 2


def mixture_tensors(
    ffn: DenseFeedForward, *, mode: str, experts: int, dtype: torch.dtype, generator: torch.Generator,
    sharpness: float = SHARPNESS, drop: float = 0.0,
) -> Iterator[tuple[str, Tensor]]:
    """Name below ``feed_forward.`` and value, in ``dtype``, of every tensor of one mixture layer.

    Args:
        ffn: what the layer has to compute.
        mode: ``shared`` or ``split``, as explained above.
        experts: number of routed experts E.
        dtype: of the tensors.
        generator: source of every random weight.
        sharpness: standard deviation of a router logit in split mode.
        drop: share of the neurons of every routed expert that are drawn anew in split mode.
    """
    width = expert_size(mode, experts, ffn.gate.shape[0])
    yield "shared_expert.gate_proj.weight", ffn.gate[:width].to(dtype)
    yield "shared_expert.up_proj.weight", ffn.up[:width].to(dtype)
    yield "shared_expert.down_proj.weight", ffn.down[:, :width].to(dtype)
    if mode == "shared":
        yield from _silent(ffn, experts, dtype, generator)
    else:
        yield "router.weight", _paired_router(ffn.norm, experts, sharpness, generator).to(dtype)
        yield from _copies(ffn, experts, drop, dtype, generator)


def _silent(
    ffn: DenseFeedForward, experts: int, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Router and routed experts of shared mode."""
    neurons, width = ffn.gate.shape
    # This deviation keeps the variance of a unit-variance input.
    deviation = width**-0.5
    yield "router.weight", (torch.randn(experts, width, generator=generator) * deviation).to(dtype)
    gate_up = torch.empty(experts, width, 2 * neurons, dtype=dtype)
    for expert in range(experts):
        gate_up[expert] = torch.randn(width, 2 * neurons, generator=generator) * deviation
    yield "experts.gate_up_proj", gate_up
    yield "experts.down_proj", torch.zeros(experts, neurons, width, dtype=dtype)


def _copies(
    ffn: DenseFeedForward, experts: int, drop: float, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Routed experts of split mode."""
    half = ffn.gate.shape[0] // 2
    neurons = (ffn.gate[half:], ffn.up[half:], ffn.down[:, half:].T)
    made = [_partly_redrawn(neurons, drop, generator) for _ in range(experts)]
    yield "experts.gate_up_proj", torch.stack([torch.cat((gate, up)).T.to(dtype) for gate, up, _ in made])
    yield "experts.down_proj", torch.stack([down.to(dtype) for _, _, down in made])


def _partly_redrawn(
    neurons: tuple[Tensor, Tensor, Tensor], share: float, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Weights [F, D] of an expert, those of some neurons drawn with the mean and deviation that all of them have."""
    if not share:
        return neurons
    count = len(neurons[0])
    chosen = torch.randperm(count, generator=generator)[: round(share * count)]
    found = []
    for weights_FD in neurons:
        own_FD = weights_FD.clone()
        fresh = torch.randn(len(chosen), weights_FD.shape[1], generator=generator)
        own_FD[chosen] = weights_FD.mean() + weights_FD.std() * fresh
        found.append(own_FD)
    return tuple(found)


def _paired_router(norm_D: Tensor, experts: int, sharpness: float, generator: torch.Generator) -> Tensor:
    """Rows +r, -r, +r', -r', ... [E, D] of norm ``sharpness / rms(w)``."""
    directions = torch.randn(experts // 2, norm_D.shape[0], generator=generator)
    directions *= sharpness / norm_D.square().mean().sqrt() / directions.norm(dim=1, keepdim=True)
    return torch.stack((directions, -directions), dim=1).flatten(0, 1)
