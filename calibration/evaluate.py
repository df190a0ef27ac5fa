"""Held-out evaluation: several variants of a model, streamed side by side over windows that no scale was fitted on.

Layer by layer, every variant is run on its own hidden states, so that errors add up as they will in the engine; each
weight of the decoder is read once for all of them. Besides, each layer is run quantised on the *exact* states, which
tells what that layer alone does to its output:

    error = |update_q - update| / |update|       of attention, and of the feed-forward, root mean square over all tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..model.checkpoint.reader import TensorReader
from .matmul_backends import Exact, MatmulBackend, Quantized
from .stream import DecoderStream, Run, States
from .vision_stream import VisionStream
from .windows import Window

LOGIT_ROWS = 128
"""Rows of one product with the head: logits of a large vocabulary are large."""


@dataclass(frozen=True)
class Quality:
    """A variant against the exact model.

    Attributes:
        mean_kl: KL(exact || variant) per token, nats.
        top1: share of tokens with the same most likely successor.
        perplexity: of the text, image tokens not counted.
        change: of the perplexity against the exact model's, 0.01 for one percent more.
        noise: standard error of ``change`` from token to token: other data would move it by as much.
    """

    mean_kl: float
    top1: float
    perplexity: float
    change: float
    noise: float


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found.

    Attributes:
        tokens: evaluated.
        exact_perplexity: of the model in float32.
        variants: quality by name.
        layer_errors: relative errors (attention, feed-forward) that each layer makes on exact inputs, by layer.
    """

    tokens: int
    exact_perplexity: float
    variants: dict[str, Quality]
    layer_errors: list[tuple[float, float]]


def evaluate(
    source: TensorReader, variants: Mapping[str, Quantized], windows: Sequence[Window], *,
    local: Quantized | None = None, on_layer: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Stream variants of a model over windows.

    Args:
        source: the checkpoint.
        variants: backends by name.
        windows: held out.
        local: a backend whose error is measured layer by layer.
        on_layer: called after every layer, for progress.
    """
    with torch.inference_mode():
        stream = DecoderStream(source)
        everyone: dict[str, MatmulBackend] = {"": Exact(), **variants}
        runs = {name: Run(_embedded(source, stream, backend, windows), backend) for name, backend in everyone.items()}
        errors = []
        for index in range(source.config.text.num_layers):
            with stream.layer(index) as layer:
                attention = _stepped(partial(stream.attend, layer), runs, local)
                feed_forward = _stepped(partial(stream.feed_forward, index, layer), runs, local)
            errors += [(attention, feed_forward)] if local else []
            for backend in filter(None, (*variants.values(), local)):
                backend.forget()
            on_layer()
        return _compared(stream, runs, windows, errors)


def _embedded(source: TensorReader, stream: DecoderStream, backend: MatmulBackend, windows: Sequence[Window]) -> States:
    ids = [window.token_ids for window in windows]
    tiles = [torch.from_numpy(window.pixels) for window in windows if window.pixels is not None]
    features: list[Tensor | None] = [None] * len(windows)
    if tiles and source.config.vision is not None:
        forget = backend.forget if isinstance(backend, Quantized) else lambda: None
        rows = VisionStream(source).features(torch.cat(tiles), backend, on_layer=forget)
        pieces = iter(rows.split([source.config.vision.tokens_per_tile * len(pixels) for pixels in tiles]))
        features = [None if window.pixels is None else next(pieces) for window in windows]
    return States(stream.embed(ids, features), [len(window) for window in ids])


def _stepped(step: Callable[[Sequence[Run]], None], runs: Mapping[str, Run], local: Quantized | None) -> float:
    """Let all runs take a step; the relative error of ``local`` on the exact states, 0 without it."""
    if local is None:
        step(list(runs.values()))
        return 0.0
    exact = runs[""].states
    before = exact.x_ND.clone()
    beside = Run(States(before.clone(), exact.lengths), local)
    step([*runs.values(), beside])
    update = exact.x_ND - before
    return float((beside.states.x_ND - exact.x_ND).norm() / update.norm().clamp(min=1e-30))


def _compared(
    stream: DecoderStream, runs: Mapping[str, Run], windows: Sequence[Window], errors: list[tuple[float, float]],
) -> Evaluation:
    ids = torch.tensor([token for window in windows for token in window.token_ids])
    targets = _targets(windows, stream.config.image_token_id if stream.config.vision else -1)
    sums = {name: torch.zeros(5, dtype=torch.float64) for name in runs}
    with stream.head() as head:
        for begin in range(0, len(ids), LOGIT_ROWS):
            rows = slice(begin, begin + LOGIT_ROWS)
            exact = head(runs[""].states.x_ND[rows], runs[""].backend).log_softmax(-1)
            for name, (states, backend) in runs.items():
                found = exact if name == "" else head(states.x_ND[rows], backend).log_softmax(-1)
                sums[name] += _row_sums(exact, found, targets[rows])
    counted = max(int((targets >= 0).sum()), 1)
    variants = {name: _quality(found, len(ids), counted) for name, found in sums.items() if name}
    return Evaluation(len(ids), _exp(float(sums[""][2]) / counted), variants, errors)


def _targets(windows: Sequence[Window], image_token: int) -> Tensor:
    """The successor of every token, -1 where a window ends or a picture goes on."""
    found = []
    for window in windows:
        after = torch.tensor([*window.token_ids[1:], -1])
        found.append(torch.where(after == image_token, -1, after))
    return torch.cat(found)


def _row_sums(exact_RV: Tensor, found_RV: Tensor, targets_R: Tensor) -> Tensor:
    """KL, same top token, negative log-likelihood, its difference to the exact one, and that squared, over rows."""
    kl = (exact_RV.exp() * (exact_RV - found_RV)).sum(-1).clamp(min=0).double().sum()
    same = (exact_RV.argmax(-1) == found_RV.argmax(-1)).double().sum()
    counted = targets_R >= 0
    exact, found = (-rows[counted].gather(1, targets_R[counted, None]).double() for rows in (exact_RV, found_RV))
    return torch.stack((kl, same, found.sum(), (found - exact).sum(), (found - exact).square().sum()))


def _quality(sums: Tensor, tokens: int, counted: int) -> Quality:
    """A variant's quality from its ``_row_sums``; ``counted`` tokens have a likelihood."""
    kl, same, loss, change, squares = sums.tolist()
    variance = max(squares / counted - (change / counted) ** 2, 0.0)
    return Quality(kl / tokens, same / tokens, _exp(loss / counted), _exp(change / counted) - 1,
                   math.sqrt(variance / counted))


def _exp(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).exp())
