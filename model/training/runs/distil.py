"""Distillation: a student learns from a teacher's distribution and from the text at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from ....errors import HerdError
from ...checkpoint import checkpoint_directory
from ...config import read_config
from ..distill import (
    CachedTeacher,
    DistillationLoss,
    Fixed,
    ModuleTeacher,
    Responsibility,
    Schedule,
    TargetCache,
    Teacher,
    Weighting,
    require_tokenizer,
    tokenizer_hash,
)
from ..moe.experts import prepare_for_training
from ..objective import Distil, logits_of
from ..optim import learning_rate_factor
from ..state import TrainProgress
from .run import OnStep, RunOptions, train_model
from .start import open_model, start_of


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(RunOptions):
    """A teacher and how much is learned from it.

    Attributes:
        teacher: directory of the teacher, or of a cache of its targets, or calf. It has to be given.
        weighting: of soft and hard targets: dynamic, by token; schedule, in phase with the learning rate; or fixed.
        soft: weight of the soft targets; of schedule at the highest rate, of dynamic before it looks at the label.
        temperature: divides the logits of both.
    """

    teacher: Path | None = None
    weighting: Literal["dynamic", "schedule", "fixed"] = "fixed"
    soft: float = 0.7
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.soft <= 1 or (self.weighting == "dynamic" and self.soft in (0, 1)):
            bounds = "between" if self.weighting == "dynamic" else "within"
            raise HerdError(f"soft is {self.soft}, {self.weighting} weights need it {bounds} 0 and 1")
        if not 0 < self.temperature < math.inf:
            raise HerdError(f"temperature is {self.temperature}, it must be above 0")


@dataclass(frozen=True, kw_only=True)
class DistilOptions(TeacherOptions):
    """Distillation.

    Attributes:
        checkpoint: the student: a directory with configuration, tokenizer, image processor and, unless fresh, weights;
            or calf; or, for random weights, a config.json or one of tiny, tiny-text, scout, maverick.
        fresh: begin with random weights instead of the checkpoint's.
    """

    checkpoint: Path
    fresh: bool = False


def loss_of(options: TeacherOptions) -> DistillationLoss:
    """The distillation loss that options describe."""
    rate = partial(learning_rate_factor, steps=options.train.steps, options=options.optimizer)
    known: dict[str, Callable[[], Weighting]] = {
        "dynamic": lambda: Responsibility(options.soft), "schedule": lambda: Schedule(options.soft, rate),
        "fixed": lambda: Fixed(options.soft)}
    return DistillationLoss(known[options.weighting](), options.temperature)


def teacher_of(options: TeacherOptions, files: Path) -> Teacher:
    """The teacher that options name.

    Args:
        options: of the run.
        files: of the student: its configuration and tokenizer.

    Raises:
        HerdError: none is named, it has another tokenizer, or it is a compiled bundle.
    """
    if options.teacher is None:
        raise HerdError("distillation needs a teacher: name a checkpoint or a cache (--teacher)")
    directory = checkpoint_directory(options.teacher)
    if (directory / "manifest.json").is_file():
        raise HerdError(f"{directory} is a compiled bundle, --teacher takes a checkpoint or a cache: name the "
                        "checkpoint that it was built from, or call distil(options, teacher=EngineTeacher("
                        "Engine.load(...))) from Python")
    student = tokenizer_hash(files)
    if (directory / "config.json").is_file():
        require_tokenizer(student, tokenizer_hash(directory))
        # Prepared as the student is: experts in groups, and a router that autocast leaves in float32.
        return ModuleTeacher(prepare_for_training(open_model(directory)), logits_of)
    cache = TargetCache(directory, tokenizer=student)
    return CachedTeacher(cache, read_config(files))


def distil(options: DistilOptions, on_step: OnStep | None = None, *, teacher: Teacher | None = None) -> TrainProgress:
    """Train a student by a teacher.

    Args:
        options: of the run.
        on_step: called after each step.
        teacher: instead of the one that options name, such as a compiled engine (``distill.EngineTeacher``).
    """
    start = start_of(options.checkpoint, options.output, fresh=options.fresh)
    chosen = teacher or teacher_of(options, start.files)
    return train_model(start.model(options.train.seed), options, start.files, on_step=on_step,
                       objective=Distil(chosen, loss_of(options)))
