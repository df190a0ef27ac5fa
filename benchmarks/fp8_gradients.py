"""Noise that a precision adds to gradients, layer by layer, beside the noise that the choice of the batch adds.

    python -m benchmarks.fp8_gradients CHECKPOINT --data FILE ... [--batches 16] [--plot FILE]

CHECKPOINT is a text model, for instance what ``benchmarks.fp8_training`` left in WORK/bf16-0/model. With g the gradient
of a batch in float32 and g' in another precision, by part of a layer,

    added noise   sqrt( sum |g' - g|^2 / sum |g - mean g|^2 )       over the batches
    bias          |E (g' - g)| / |E g|

At an added noise of n a step has the noise of a batch that is 1 / (1 + n^2) as large: 0.1 costs 1 % of the tokens.
Bias is what no larger batch averages away. Squares of both means are estimated without their own noise, from products
of different batches; below 0 they are 0.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from rich.table import Table
from torch import Tensor

from herdgraph.console import stderr, stdout
from herdgraph.model.config import read_config
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.training.data import Batch
from herdgraph.model.training.fp8.autocast import Fp8Scaling
from herdgraph.model.training.fp8.linear import Fp8Options, fp8_autocast, prepare_for_fp8
from herdgraph.model.training.moe.experts import prepare_for_training
from herdgraph.model.training.objective import NextToken, labelled
from herdgraph.model.training.parallel.ranks import Ranks
from herdgraph.model.training.runs.run import RunOptions, loaders
from herdgraph.model.training.runs.start import open_model

from .figures import curves
from .fp8_training import multiply_bfloat16_in_float32

Gradients = dict[str, Tensor]
_PARTS = {"self_attn": "attention", "shared_expert": "shared", "experts": "experts", "router": "router"}


def bfloat16(recipe: Fp8Options | None) -> AbstractContextManager[object]:
    """Products in bfloat16, those of feed-forwards in FP8 when there is a recipe."""
    stack = ExitStack()
    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    stack.enter_context(fp8_autocast(recipe))
    return stack


def precisions() -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """Contexts by name."""
    recipes = {f"fp8 {name}": partial(bfloat16, Fp8Options(name)) for name in get_args(Fp8Scaling)}
    return {"fp32": nullcontext, "bf16": partial(bfloat16, None), **recipes}


def part_of(name: str) -> str:
    """Layer and part of a parameter, or what it is outside of the layers; norms go with the layer's router."""
    layer = re.search(r"layers\.(\d+)\.(.*)", name)
    if layer is None:
        return "embedding and head"
    return f"{layer[1]} {next((part for key, part in _PARTS.items() if key in layer[2]), 'router')}"


def gradients(model: Llama4, batch: Batch, precision: Callable[[], AbstractContextManager[object]]) -> Gradients:
    """Gradients of the mean loss of a batch, joined by part."""
    model.zero_grad()
    with precision():
        loss, _ = NextToken()(model, batch, 0)
    (loss / labelled(batch)).backward()
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(part_of(name), []).append(parameter.grad.flatten())
    return {name: torch.cat(found) for name, found in parts.items()}


class Noise:
    """Sums over batches of what a precision adds to the gradients of float32."""

    def __init__(self) -> None:
        self.squares: dict[str, float] = {}
        self.sums: Gradients = {}
        self.count = 0

    def add(self, differences: Gradients) -> None:
        """One more batch."""
        self.count += 1
        for part, value in differences.items():
            self.squares[part] = self.squares.get(part, 0.0) + float(value.square().sum())
            self.sums[part] = self.sums[part] + value if part in self.sums else value.clone()

    def spread(self, part: str) -> float:
        """Sum of squared distances from the mean."""
        return max(self.squares[part] - float(self.sums[part].square().sum()) / self.count, 1e-30)


    def mean_square(self, part: str) -> float:
        """Of the expectation, from products of different batches."""
        pairs = self.count * (self.count - 1)
        return (float(self.sums[part].square().sum()) - self.squares[part]) / pairs


def measure(model: Llama4, batches: list[Batch]) -> dict[str, Noise]:
    """Gradients in float32, and what each precision adds to them."""
    found = {name: Noise() for name in precisions()}
    for number, batch in enumerate(batches, 1):
        exact = gradients(model, batch, nullcontext)
        found["fp32"].add(exact)
        for name, precision in precisions().items():
            if name != "fp32":
                rounded = gradients(model, batch, precision)
                found[name].add({part: rounded[part] - value for part, value in exact.items()})
        stderr.print(f"batch {number} of {len(batches)}")
    return found


def added(found: dict[str, Noise], name: str, part: str) -> tuple[float, float]:
    """Added noise and bias."""
    exact, own = found["fp32"], found[name]
    bias = math.sqrt(max(0.0, own.mean_square(part)) / max(exact.mean_square(part), 1e-30))
    return math.sqrt(own.squares[part] / exact.spread(part)), bias


def report(found: dict[str, Noise]) -> Table:
    """Added noise, and in brackets bias, of every part."""
    names = [name for name in found if name != "fp32"]
    table = Table("layer, part", *names, title="noise added to gradients, of the batch's noise (bias)")
    for part in sorted(found["fp32"].sums):
        table.add_row(part, *("{:.3f} ({:.3f})".format(*added(found, name, part)) for name in names))
    return table


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    for name, default in (("batches", 16), ("rows", 4), ("length", 128), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kernels = multiply_bfloat16_in_float32()
    model = prepare_for_training(open_model(args.checkpoint))
    prepare_for_fp8(model)
    options = RunOptions(data=tuple(args.data), output=args.checkpoint, rows=args.rows, seq_len=args.length)
    loader, _ = loaders(options, read_config(args.checkpoint), args.checkpoint, Ranks.alone())
    found = measure(model.train(), [batch for _, batch in zip(range(args.batches), loader, strict=False)])
    stdout.print(report(found), "" if kernels is None else "bfloat16 products were computed in float32")
    if args.plot:
        layers = range(model.config.text.num_layers)
        curves(args.plot, "noise that precision adds to gradients of experts", "layer", "of the batch's noise",
               {name: [(layer, added(found, name, f"{layer} experts")[0]) for layer in layers]
                for name in found if name != "fp32"})


if __name__ == "__main__":
    main()
