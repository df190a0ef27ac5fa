"""What a step of distillation costs: from cached targets, from a teacher that all students share, from one that learns.

    python -m benchmarks.codistillation WORK --teacher DIR --data FILE ... [--students 1 3] [--steps 8]

Teacher, students and data are those of ``benchmarks.distillation``, whose WORK may be given. Printed is the processor
time of a step of all models together, median after the first two: others may use the machine.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from herdgraph.console import stderr, stdout
from herdgraph.model.training.runs import CodistilOptions, PretrainOptions, codistil, pretrain
from herdgraph.model.training.runs.run import OnStep
from herdgraph.model.training.train_options import TrainOptions

from .distillation import cached_targets, pages_of, parser_of, student_files
from .short_vocabulary import shorten

Run = Callable[[OnStep], object]


def seconds_per_step(run: Run) -> float:
    """Median processor time between the ends of two steps."""
    ends: list[float] = []
    run(lambda _progress, _record: ends.append(time.process_time()))
    return statistics.median(after - before for before, after in pairwise(ends[1:]))


def ways(count: int, args: argparse.Namespace) -> Mapping[str, Run]:
    """Ways to train some students, by name."""
    files = student_files(args)
    student = files / "config.json"  # random weights
    shared: dict[str, Any] = {
        "data": (pages_of(args),), "output": args.work / "steps", "rows": args.rows, "seq_len": args.length,
        "held_out": 0.05, "held_out_batches": 0, "train": TrainOptions(steps=args.steps)}

    def together(teacher: Path, **options: Any) -> Run:
        made = CodistilOptions(**shared, **options, students=(student,) * count, teacher=teacher)
        return lambda on_step: codistil(made, on_step)

    labels = PretrainOptions(**shared, checkpoint=student)
    alone = {"labels": lambda on_step: pretrain(labels, on_step)} if count == 1 else {}
    return {**alone, "cached targets": together(cached_targets(files, args)),
            "a shared teacher": together(args.teacher),
            "a teacher that learns": together(args.teacher, teacher_learns=True)}


def main() -> None:
    """Parse the command line and measure."""
    parser = parser_of(__doc__)
    parser.add_argument("--students", type=int, nargs="+", default=[1, 3])
    parser.set_defaults(steps=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shorten(args.teacher, args.data, args.work / "teacher")
    args.teacher = args.work / "teacher"
    table = Table("students", "learn from", "seconds per step",
                  title=f"{args.rows * args.length} tokens a step, students {args.width} wide, one thread")
    for count in args.students:
        for name, run in ways(count, args).items():
            shutil.rmtree(args.work / "steps", ignore_errors=True)
            seconds = seconds_per_step(run)
            stderr.print(f"{count}, {name}: {seconds:.2f} s")
            table.add_row(str(count), name, f"{seconds:.2f}")
    stdout.print(table)


if __name__ == "__main__":
    main()
