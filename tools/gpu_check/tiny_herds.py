"""Step 2: tiny models through ``Engine``, on the GPU, against what the same models said on a CPU in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .artifacts import HERDS, RANKS, target_for
from .check import Place, Report
from .formulas import error
from .graphs import Array

LIMITS = {"cpu-fp32": (1e-4, 0.0), "cuda-bf16": (3e-2, 0.1)}
"""Of a position's logits, in the median, and of the share of positions that choose another token. In bfloat16 a router
now and then sends a token to another expert, which changes that position altogether: so no mean and no maximum."""
COARSE = (0.3, 0.5)
"""Of recipes that store weights in 8 or 4 bits, which on random weights say that nothing is grossly wrong."""
CLOSE = 0.1
"""Standard deviations of the logits below which a greedy token may be another one: rounding decides there."""


def run(place: Place, report: Report) -> None:
    """Every bundle that was made for the device."""
    target = target_for(place.device)
    bundles = sorted((place.artifacts / HERDS).glob(f"*/{target}-*"))
    for bundle in (bundle for bundle in bundles if bundle.parent.name != RANKS):
        name = f"{bundle.parent.name} {bundle.name}"
        with report.attempt(name):
            for part, error, others in differences(bundle):
                judge(place, report, bundle, part, error, others)


def judge(place: Place, report: Report, bundle: Path, part: str, found: float, others: float) -> None:
    """Write down what ``differences`` found of a part."""
    name = f"{bundle.parent.name} {bundle.name}, {part}"
    most, most_others = LIMITS.get(bundle.name.partition("-tp")[0], COARSE)
    report.error(name, found, most, real=place.real)
    report.error(f"{name}, other tokens", others, most_others, real=place.real)


def differences(bundle: Path, **options: Any) -> Iterator[tuple[str, float, float]]:
    """Of every part of a bundle's text: the error of logits, and how many positions choose another token.

    Args:
        bundle: beside what a CPU said of the text.
        options: of ``Engine.load``.
    """
    for part, found, wanted in _compare(bundle, options):
        yield part, _median_error(found, wanted), _other_tokens(found, wanted)


def _compare(bundle: Path, options: Mapping[str, Any]) -> Iterator[tuple[str, Array, Array]]:
    """A prompt over several chunks, tokens one by one, tokens beside others of other lengths; with the CPU's logits."""
    from herdgraph import Engine

    with np.load(bundle.parent / "expected.npz") as archive:
        wanted: dict[str, Array] = dict(archive)
    ids, prompt, logits = wanted["ids"].tolist(), int(wanted["prompt"]), wanted["logits"]
    with Engine.load(bundle, **options) as engine:
        sequence, seen = engine.new_sequence(), wanted["pixels"] if len(wanted["pixels"]) else None
        yield "prompt", engine.prefill(sequence, ids[:prompt], seen, all_positions=True), logits[:prompt]
        yield "tokens", np.stack([engine.decode(sequence, token) for token in ids[prompt:]]), logits[prompt:]
        if seen is None:
            lengths = [prompt, prompt // 2, prompt // 3]
            yield "batch", _batched(engine, ids, lengths), logits[lengths]


def _batched(engine: Any, ids: list[int], lengths: list[int]) -> Array:
    """The next token of sequences of several lengths, decoded together."""
    sequences = [engine.new_sequence() for _ in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        engine.prefill(sequence, ids[:length])
    return np.asarray(engine.decode_batch(sequences, [ids[length] for length in lengths]))


def _median_error(found: Array, wanted: Array) -> float:
    """Relative error of a position's logits."""
    return float(np.median([error(row, other) for row, other in zip(found, wanted, strict=True)]))


def _other_tokens(found: Array, wanted: Array) -> float:
    """The share of positions that choose another token, where the best is clearly better than the second."""
    best = np.sort(wanted, axis=-1)
    clear = best[:, -1] - best[:, -2] > CLOSE * wanted.std()
    return float(np.mean((found.argmax(-1) != wanted.argmax(-1)) & clear))
