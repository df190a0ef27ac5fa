"""Loss curves in bfloat16 and in FP8 over a real run: the calf on its own data, same weights, same batches.

    python -m benchmarks.fp8_training CALF [--steps 300] [--threads 1] [--plot FILE]

CALF is what ``examples/calf/train.py`` works in. Printed is the mean loss over windows of 50 steps, and how far FP8 is
from bfloat16 in each; the same for another seed of bfloat16 says what is noise.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from herdgraph.console import stderr, stdout
from herdgraph.model.training.fp8.linear import Fp8Options
from herdgraph.model.training.moe.experts import ExpertOptions
from herdgraph.model.training.optim import OptimizerOptions
from herdgraph.model.training.runs import PretrainOptions, pretrain
from herdgraph.model.training.trainer import TrainOptions

from .figures import curves

WINDOW = 50


def losses(calf: Path, name: str, options: PretrainOptions) -> list[float]:
    """The losses of a run; it goes on where it was cut off."""
    stderr.print(f"training: {name}")
    output = calf / "fp8-training" / name.replace(" ", "-")
    return pretrain(replace(options, output=output)).losses


def windows(values: list[float]) -> list[float]:
    """Means over windows."""
    return [statistics.mean(values[at : at + WINDOW]) for at in range(0, len(values) - WINDOW + 1, WINDOW)]


def main() -> None:
    """Parse the command line, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calf", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipes", nargs="+", default=["tensorwise", "rowwise"])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = tuple(args.calf / "data" / f"{name}.jsonl" for name in ("train", "text"))
    base = PretrainOptions(
        checkpoint=args.calf / "tower" / "model", data=data, output=args.calf, rows=8, seq_len=256, held_out=0.0,
        train=TrainOptions(steps=args.steps, precision="bf16", save_every=100),
        optimizer=OptimizerOptions(learning_rate=3e-3, warmup=50),
        experts=ExpertOptions(bias_rate=0, balance_loss=0.01),
    )
    runs = {"bf16": base, "bf16 seed 1": replace(base, train=replace(base.train, seed=1))}
    runs |= {f"fp8 {name}": replace(base, train=replace(base.train, precision="fp8"), fp8=Fp8Options(name=name))
             for name in args.recipes}
    found = {name: losses(args.calf, name, options) for name, options in runs.items()}
    reference = windows(found["bf16"])
    table = Table(title=f"mean loss by {WINDOW} steps of 2048 tokens; difference from bf16")
    for column in ("", *(f"to {WINDOW * (at + 1)}" for at in range(len(reference)))):
        table.add_column(column)
    for name, values in found.items():
        table.add_row(name, *(f"{mean:.3f} ({mean / other - 1:+.2%})" for mean, other in zip(
            windows(values), reference, strict=True)))
    stdout.print(table)
    if args.plot:
        curves(args.plot, "the calf in bfloat16 and in FP8", "step", "loss per token", {
            name: [(WINDOW * (at + 0.5), mean) for at, mean in enumerate(windows(values))]
            for name, values in found.items()})


if __name__ == "__main__":
    main()
