"""What FP8 costs on a real model and real English, by observer, by form of the scales, and by what stays in bf16.

    python -m benchmarks.fp8 [CHECKPOINT] [--windows 8]

Calibrated on the built-in text, evaluated on text that no scale was fitted on (Alice in Wonderland, entries of the
Jargon File). All rows of a table are one pass over the same tokens. ``python -m benchmarks.quality --recipes fp8``
measures the built bundle.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from herdgraph.calibration.calibrate import backend_factory
from herdgraph.calibration.evaluate import evaluate
from herdgraph.calibration.matmul_backends import Quantized
from herdgraph.calibration.measure import measure
from herdgraph.calibration.samples import read_samples
from herdgraph.calibration.windows import Window, data_of
from herdgraph.console import fail
from herdgraph.export.weights.fp8 import Fp8Codes
from herdgraph.model.checkpoint import Checkpoint, open_checkpoint
from herdgraph.model.processing import PromptProcessor
from herdgraph.model.quantization.calibration_file import CalibrationFile
from herdgraph.model.quantization.observers import OBSERVERS
from herdgraph.model.quantization.outliers import outlier_channels
from herdgraph.model.quantization.parts import parts_of
from herdgraph.model.quantization.recipes import RECIPES, Recipe

from .quality import TEXTS, WINDOW

FP8 = RECIPES["fp8"]
Outliers = Callable[[str], Tensor | None]
"""The outlier channels of a weight's input, by the weight's name."""


class WeightsOnly(Quantized):
    """FP8 weights, exact inputs."""

    def __call__(self, name: str, x: Tensor, weight_KN: Tensor, expert: int | None = None) -> Tensor:
        """``x @ weight`` with a rounded weight and an exact input."""
        return x @ self._rounded_weight(name, weight_KN) if self.recipe.layout_of(name) else x @ weight_KN


class InputsOnly(Quantized):
    """FP8 inputs, exact weights."""

    def _rounded_weight(self, name: str, weight_KN: Tensor) -> Tensor:
        return weight_KN


class ByHessians(Quantized):
    """FP8 weights as a build rounds them, by the Hessians of a calibration."""

    hessians: CalibrationFile
    expert: int | None = None

    def __call__(self, name: str, x: Tensor, weight_KN: Tensor, expert: int | None = None) -> Tensor:
        """``x @ weight``, in FP8 when the recipe says so."""
        self.expert = expert
        return super().__call__(name, x, weight_KN, expert)

    def _rounded_weight(self, name: str, weight_KN: Tensor) -> Tensor:
        source, found = self._weights.get(name, (None, None))
        if source is None or found is None or source.data_ptr() != weight_KN.data_ptr():
            outliers_J = self._outliers(name)
            codes = Fp8Codes(ir.Tensor(weight_KN.numpy()), lambda _: self.hessians.hessian(name, self.expert),
                             outliers_J)
            found = torch.from_numpy(codes.numpy().astype(np.float32) * codes.scales())
            if outliers_J is not None:
                found[outliers_J] = weight_KN[outliers_J]
            self._weights[name] = weight_KN, found
        return found


def variants(amaxes: dict[str, Tensor], checkpoint: Checkpoint, hessians: CalibrationFile) -> dict[str, Quantized]:
    """Rows of the table."""
    make_backend = backend_factory(amaxes, "mse")
    shared = {name: found.max().expand(found.shape) if ".experts." in name and "energy" not in name else found
              for name, found in amaxes.items()}

    def amax(name: str) -> Tensor:
        return amaxes[f"mse/{name}"]

    def outliers(name: str) -> Tensor | None:
        return outlier_channels(amaxes.get(f"input_energy/{name}"))

    rows: dict[str, Quantized] = {f"observer {name}": backend_factory(amaxes, name)(FP8) for name in OBSERVERS}

    def by_hessians(name: str, recipe: Recipe, chosen: Outliers) -> Quantized:
        row = ByHessians(recipe, lambda weight: amaxes[f"{name}/{weight}"], chosen)
        row.hessians = hessians
        return row

    for name in ("mse", "max"):
        rows[f"{name}, by Hessians"] = by_hessians(name, FP8, outliers)
        rows[f"{name}, by Hessians, no outlier channels"] = by_hessians(name, FP8, lambda _: None)
    others = [rule for name, rules in parts_of(checkpoint.config).items() if name != "routed experts" for rule in rules]
    rows["mse, by Hessians, routed experts only (Meta's choice)"] = by_hessians(
        "mse", FP8.with_high_precision(others), outliers)
    rows["mse, one scale for all experts of a layer"] = backend_factory(shared, "mse")(FP8)
    rows["max, no outlier channels"] = Quantized(FP8, lambda name: amaxes[f"max/{name}"], lambda _: None)
    rows["mse, only weights in FP8"] = WeightsOnly(FP8, amax, outliers)
    rows["mse, only inputs in FP8"] = InputsOnly(FP8, amax, outliers)
    for name, rules in parts_of(checkpoint.config).items():
        rows[f"mse, {name} in high precision"] = make_backend(FP8.with_high_precision(rules))
    return rows


def held_out(checkpoint: Checkpoint, count: int) -> list[Window]:
    """Windows of text that was used for nothing else."""
    tokenizer = PromptProcessor(checkpoint.directory, checkpoint.config).tokenizer
    ids = [token for path in TEXTS for token in tokenizer.encode(path.read_text(encoding="utf-8"))]
    return [Window(ids[first : first + WINDOW]) for first in range(0, len(ids) - WINDOW + 1, WINDOW)][:count]


def measured(checkpoint: Checkpoint, work: Path) -> dict[str, Tensor]:
    """Magnitudes by every observer and energies, from the built-in text; Hessians are left in a directory."""
    data = data_of(checkpoint, read_samples([], images=False), most_tokens=16384)
    return measure(checkpoint, data, work, key="").amaxes


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path(".cache/demo/checkpoint"))
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    if not args.checkpoint.is_dir():
        fail(f"{args.checkpoint} does not exist: run `make demo` once, or name a checkpoint")
    torch.manual_seed(0)
    with open_checkpoint(args.checkpoint) as checkpoint, tempfile.TemporaryDirectory() as name:
        amaxes = measured(checkpoint, Path(name) / "work")
        hessians = CalibrationFile(Path(name) / "work", {}, "mse", source=checkpoint)
        found = evaluate(checkpoint, variants(amaxes, checkpoint, hessians), held_out(checkpoint, args.windows))
    table = Table(title=f"{found.tokens} tokens, float32 perplexity {found.exact_perplexity:.3f}")
    for column in ("", "perplexity", "change", "mean KL", "same top token"):
        table.add_column(column, no_wrap=True)
    for name, row in found.variants.items():
        table.add_row(name, f"{row.perplexity:.3f}", f"{row.change:+.2%}", f"{row.mean_kl:.2e}", f"{row.top1:.1%}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
