"""Loss curves in float32, bfloat16 and FP8 over a real run: same weights, same batches, several seeds; and their speed.

    python -m benchmarks.fp8_training WORK --data FILE ... [--checkpoint DIR] [--steps 300] [--seeds 0 1 2]
        [--precisions fp32 tensorwise rowwise] [--plot FILE]

Without a checkpoint a text model begins with random weights: the calf's decoder (4 layers, width 192, 4 experts in
each, its vocabulary). The calf itself: ``--checkpoint CALF/tower/model --data CALF/data/train.jsonl
CALF/data/text.jsonl``, where CALF is what ``examples/calf/train.py`` works in. Printed are the mean loss of the last 50
steps, the held-out loss, how far each is from bfloat16 of the same seed, and the median speed.

A run goes on where it was cut off, so the command may be stopped and repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table

from examples.calf.config import calf_config
from herdgraph.console import stderr, stdout
from herdgraph.model.config import HerdConfig, to_hf
from herdgraph.model.training.fp8.linear import Fp8Options
from herdgraph.model.training.optim import OptimizerOptions
from herdgraph.model.training.runs import PretrainOptions, pretrain
from herdgraph.model.training.train_options import TrainOptions

from .figures import curves

Precision = Literal["bf16", "fp32", "fp8"]
WINDOW = 50


def multiply_bfloat16_in_float32() -> torch.library.Library | None:
    """Where a CPU has no instructions for bfloat16: the same products, summed in float32 too, several times as fast.

    They hold as long as what is returned lives.
    """
    if torch.cpu._is_avx512_bf16_supported():
        return None

    def mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        # addmm, because mm in float32 would come here again
        zero = torch.zeros((), dtype=torch.float32)
        return torch.addmm(zero, left.float(), right.float(), beta=0).to(left.dtype)

    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("mm", mm, "CPU")
    kernels.impl("mm.out", lambda left, right, *, out: out.copy_(mm(left, right)), "CPU")
    return kernels


@dataclass(frozen=True)
class Run:
    """Losses by step, the held-out loss at the end, and the median speed in tokens/s."""

    losses: list[float]
    held_out: float
    speed: float

    @property
    def last(self) -> float:
        """Mean loss of the last window."""
        return statistics.mean(self.losses[-WINDOW:])


def run(options: PretrainOptions) -> Run:
    """Train, or go on where a run was cut off."""
    stderr.print(f"training: {options.output}")
    progress = pretrain(options)
    records = (options.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speed = statistics.median(json.loads(record)["tokens_per_second"] for record in records)
    return Run(progress.losses, progress.held_out[progress.step], speed)


def precisions(names: list[str]) -> dict[str, tuple[Precision, Fp8Options]]:
    """bfloat16 and what is compared with it: precisions and scaling."""
    found: dict[str, tuple[Precision, Fp8Options]] = {"bf16": ("bf16", Fp8Options())}
    for name in names:
        if name == "fp32":
            found[name] = ("fp32", Fp8Options())
        else:
            found[f"fp8 {name}"] = ("fp8", Fp8Options(name=name))  # type: ignore[arg-type]
    return found


def base_options(args: argparse.Namespace) -> PretrainOptions:
    """What all runs share."""
    checkpoint = args.checkpoint or args.work / "config.json"
    if args.checkpoint is None:
        args.work.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(json.dumps(to_hf(HerdConfig(text=calf_config().text))), encoding="utf-8")
    return PretrainOptions(
        checkpoint=checkpoint, data=tuple(args.data), output=args.work, rows=args.rows, seq_len=args.length,
        held_out=0.02, held_out_batches=16, train=TrainOptions(steps=args.steps, log_every=1),
        optimizer=OptimizerOptions(learning_rate=3e-3, warmup=args.steps // 10),
    )


def report(found: dict[str, list[Run]], args: argparse.Namespace) -> Table:
    """Means over seeds, and the largest differences from bfloat16 of the same seed."""
    table = Table(title=f"{args.steps} steps of {args.rows * args.length} tokens, {len(args.seeds)} seed(s); in "
                        "brackets how far from bf16 of the same seed, by seed")
    for column in ("", f"loss, last {WINDOW} steps", "held-out loss", "tokens/s"):
        table.add_column(column)
    for name, runs in found.items():
        cells = []
        for figure in ("last", "held_out"):
            values, others = ([getattr(one, figure) for one in several] for several in (runs, found["bf16"]))
            apart = ", ".join(f"{value / other - 1:+.2%}" for value, other in zip(values, others, strict=True))
            cells.append(f"{statistics.mean(values):.3f} ({apart})")
        table.add_row(name, *cells, f"{statistics.median(one.speed for one in runs):.0f}")
    return table


def windows(values: list[float], length: int = WINDOW // 2) -> list[tuple[float, float]]:
    """Means over windows, at their middles."""
    return [(at + length / 2, statistics.mean(values[at : at + length])) for at in range(0, len(values), length)]


def main() -> None:
    """Parse the command line, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "tensorwise", "rowwise"])
    for name, default in (("steps", 300), ("rows", 4), ("length", 128), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--native-bfloat16", action="store_true", help="torch's own bfloat16 products")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kernels = None if args.native_bfloat16 else multiply_bfloat16_in_float32()
    base, found = base_options(args), {}
    for name, (precision, recipe) in precisions(args.precisions).items():
        found[name] = [run(replace(
            base, output=args.work / f"{name.replace(' ', '-')}-{seed}", fp8=recipe,
            train=replace(base.train, precision=precision, seed=seed))) for seed in args.seeds]
    stdout.print(report(found, args), "" if kernels is None else "bfloat16 products were computed in float32")
    if args.plot:
        means = {name: [statistics.mean(losses) for losses in zip(*(one.losses for one in runs), strict=True)]
                 for name, runs in found.items()}
        curves(args.plot, f"in bfloat16 and in FP8, mean over {len(args.seeds)} seed(s)", "step", "loss per token",
               {name: windows(losses) for name, losses in means.items()})


if __name__ == "__main__":
    main()
