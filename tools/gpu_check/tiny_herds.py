"""Step 2: tiny models through ``Engine``, on the GPU, against what the same models said on a CPU in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .artifacts import HERDS, target_for
from .check import Place, Report
from .formulas import error

LIMITS = {"cpu-fp32": 1e-4, "cuda-bf16": 3e-2}
"""Of logits: bfloat16 adds up the rounding of all layers."""
COARSE = 0.3
"""Of recipes that store weights in 8 or 4 bits, which on random weights say that nothing is grossly wrong."""
CLOSE = 0.1
"""Standard deviations of the logits below which a greedy token may be another one: rounding decides there."""


def run(place: Place, report: Report) -> None:
    """Every bundle that was made for the device."""
    folders = sorted(path for path in (place.artifacts / HERDS).glob("*") if path.is_dir())
    target = target_for(place.device)
    found = False
    for folder in folders:
        for bundle in sorted(folder.glob(f"{target}-*")):
            found = True
            name = f"{folder.name} {bundle.name}"
            with report.attempt(name):
                for part, value in _compare(bundle, folder):
                    limit = 0.0 if part == "other greedy tokens" else LIMITS.get(bundle.name, COARSE)
                    if limit or bundle.name in LIMITS:
                        report.error(f"{name}: {part}", value, limit, real=place.real)
    if not found:
        report.skip("tiny models", f"no bundles for target {target} were made: this version has no such target")


def _compare(bundle: Path, folder: Path) -> Iterator[tuple[str, float]]:
    """A prompt over several chunks, then tokens one by one, then beside others of other lengths; against the CPU's."""
    from herdgraph import Engine

    with np.load(folder / "expected.npz") as archive:
        wanted: dict[str, Any] = dict(archive)
    ids, prompt, pixels = wanted["ids"].tolist(), int(wanted["prompt"]), wanted["pixels"]
    with Engine.load(bundle) as engine:
        sequence, seen = engine.new_sequence(), pixels if len(pixels) else None
        said = engine.prefill(sequence, ids[:prompt], seen, all_positions=True)
        yield "prompt", error(said, wanted["logits"][:prompt])
        stepped = np.stack([engine.decode(sequence, token) for token in ids[prompt:]])
        yield "tokens", error(stepped, wanted["logits"][prompt:])
        yield "other greedy tokens", _other_tokens(stepped, wanted["logits"][prompt:])
        if seen is None:
            yield "batch", _batched(engine, ids, prompt, wanted["logits"])


def _other_tokens(found: Any, wanted: Any) -> float:
    """How many positions choose another token, though the best is clearly better than the second."""
    best = np.sort(wanted, axis=-1)
    clear = best[:, -1] - best[:, -2] > CLOSE * wanted.std()
    return float(np.sum((found.argmax(-1) != wanted.argmax(-1)) & clear))


def _batched(engine: Any, ids: list[int], prompt: int, wanted: Any) -> float:
    """Sequences of three lengths, decoded together."""
    lengths = [prompt, max(1, prompt // 2), max(1, prompt // 3)]
    sequences = [engine.new_sequence() for _ in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        engine.prefill(sequence, ids[:length])
    found = engine.decode_batch(sequences, [ids[length] for length in lengths])
    return error(found, wanted[lengths])
