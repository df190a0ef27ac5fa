"""What a model loses by 4 bits in one part of one layer at a time, beside what ``--bits`` expects.

    python -m benchmarks.sensitivity CHECKPOINT CALIBRATION [--tokens 512] [--json]

Everything else stays float32. A part's weights are rounded by GPTQ in the rotated basis, as a build rounds them but
for hidden values, which a build rotates, too; the KL is against the exact model, on the beginnings of two texts that
nothing was fitted on. *expected* is what ``--bits`` reckons with (``export/allocation.py``), from samples of the
weights and the calibration alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from herdgraph.calibration.matmul_backends import Exact
from herdgraph.calibration.stream import DecoderStream, Run, States
from herdgraph.console import run_cli
from herdgraph.export.allocation import choices, parts_of
from herdgraph.export.targets.cpu import CPU
from herdgraph.export.weights.block import BlockRounder, filled_up
from herdgraph.export.weights.gptq import inverse_hessian_cholesky
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.processing import PromptProcessor
from herdgraph.model.quantization.calibration_check import calibration_for
from herdgraph.model.quantization.calibration_file import CalibrationFile
from herdgraph.model.quantization.formats import BlockFormat
from herdgraph.model.quantization.packed_sizes import INPUT_BLOCK, filled
from herdgraph.model.quantization.recipes import RECIPES

DATA = Path(__file__).parent / "data"
TEXTS = ("alice", "jargon")
FORMAT = BlockFormat(4, 64)


class Rounding(Exact):
    """Exact products but for those with the weights of one part.

    Args:
        calibration: Hessians in the basis of the model that runs.
        of_part: whether a weight, by its canonical name, belongs to the part.
    """

    def __init__(self, calibration: CalibrationFile, of_part: Callable[[str], bool]) -> None:
        self.calibration, self.of_part = calibration, of_part
        self._rounded: dict[tuple[str, int | None], Tensor] = {}

    def __call__(self, name: str, x: Tensor, weight_KN: Tensor, expert: int | None = None) -> Tensor:
        """``x @ weight``, rounded where it belongs to the part."""
        if not self.of_part(name):
            return x @ weight_KN
        key = name, expert
        if key not in self._rounded:
            self._rounded[key] = rounded(weight_KN, self.calibration.hessian(name, expert))
        return x @ self._rounded[key]


def rounded(weight_KN: Tensor, hessian_KK: Tensor | None) -> Tensor:
    """A weight after a trip through 4 bits by GPTQ."""
    assert hessian_KK is not None, "choices() has asked for it before"
    rest = filled(len(hessian_KK), INPUT_BLOCK) - len(hessian_KK)
    factor_KK = inverse_hessian_cholesky(functional.pad(hessian_KK, (0, rest, 0, rest)))
    padded = filled_up(weight_KN.T.contiguous().numpy(), INPUT_BLOCK)
    values = BlockRounder(FORMAT).quantize(padded, factor_KK).values().reshape(padded.shape)
    return torch.from_numpy(np.ascontiguousarray(values[:, : len(hessian_KK)].T))


def losses(calibration: CalibrationFile, windows: list[list[int]]) -> Iterator[tuple[str, float]]:
    """KL per token of each part, layer by layer."""
    source = calibration.source
    assert source is not None
    stream, parts = DecoderStream(source), parts_of(source.config)
    with torch.inference_mode():
        before = States(stream.embed(windows, [None] * len(windows)), [len(window) for window in windows])
        exact = logits_of(stream, _from(stream, 0, before, Exact()))
        for index in range(source.config.text.num_layers):
            for part in parts:
                if part.name.startswith(f"layers.{index}."):
                    found = logits_of(stream, _from(stream, index, before, Rounding(
                        calibration, lambda name, of=part.tensors: name in of)))
                    yield part.name, float((exact.exp() * (exact - found)).sum(-1).mean())
            _through(stream, index, before, Exact())


def _from(stream: DecoderStream, first: int, before: States, backend: Exact) -> States:
    """States after all layers, of those before one of them."""
    states = States(before.x_ND.clone(), before.lengths)
    for index in range(first, stream.config.text.num_layers):
        _through(stream, index, states, backend)
    return states


def _through(stream: DecoderStream, index: int, states: States, backend: Exact) -> None:
    with stream.layer(index) as layer:
        stream.attend(layer, [Run(states, backend)])
        stream.feed_forward(index, layer, [Run(states, backend)])


def logits_of(stream: DecoderStream, states: States) -> Tensor:
    """Log-probabilities [T, V]."""
    with stream.head() as head:
        return head(states.x_ND, Exact()).log_softmax(-1)


def expected(calibration: CalibrationFile) -> dict[str, float]:
    """What ``--bits`` expects a part to lose in 4 bits, by its name."""
    assert calibration.source is not None
    parts = [part for part in parts_of(calibration.source.config) if part.name.startswith("layers.")]
    sizes = {name: (0.0,) for part in parts for name in part.tensors}
    return {choice.part.name: choice.losses[0] for choice in choices(parts, CPU.ladder[:1], calibration, sizes)}


def show(rows: list[dict[str, Any]]) -> None:
    """Print a row per layer, a column per part."""
    roles = sorted({row["role"] for row in rows})
    table = Table("layer", *(f"{role}: KL (expected)" for role in roles), box=box.MARKDOWN)
    for layer in sorted({row["layer"] for row in rows}):
        cells = {row["role"]: f"{row['kl']:.1e} ({row['expected']:.1e})" for row in rows if row["layer"] == layer}
        table.add_row(str(layer), *(cells.get(role, "") for role in roles))
    Console(width=160).print(table)


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--tokens", type=int, default=512, help="of each text")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    with open_checkpoint(args.checkpoint) as checkpoint:
        calibration = calibration_for(CPU.stored(RECIPES["int4"]), args.calibration, checkpoint)
        assert calibration is not None
        tokenizer = PromptProcessor(checkpoint.directory, checkpoint.config).tokenizer
        texts = [(DATA / f"{text}.txt").read_text(encoding="utf-8") for text in TEXTS]
        windows = [tokenizer.encode(text)[: args.tokens] for text in texts]
        reckoned = expected(calibration)
        rows = []
        for name, kl in losses(calibration, windows):
            _, layer, role = name.split(".", 2)
            rows.append({"layer": int(layer), "role": role, "kl": kl, "expected": reckoned[name]})
    print(json.dumps(rows)) if args.json else show(rows)


if __name__ == "__main__":
    run_cli(main)
