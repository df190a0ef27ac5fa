"""Distillation: a student learns from a teacher's distribution and from the text at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from ....errors import HerdError
from ...checkpoint import checkpoint_directory
from ...config import read_config
from ..distill import (
    DIVERGENCES,
    CachedTeacher,
    DistillationLoss,
    Fixed,
    LossRatioBalance,
    ModuleTeacher,
    Schedule,
    TargetCache,
    Teacher,
    TeacherCertainty,
    TeacherConfidence,
    WeightedSoftLabels,
    Weighting,
    dynamic,
    require_tokenizer,
    tokenizer_hash,
)
from ..moe.experts import prepare_for_training
from ..objective import Distil, logits_of
from ..state import TrainProgress
from .run import OnStep, RunOptions, train_model
from .start import open_model, start_of


@dataclass(frozen=True, kw_only=True)
class DistilOptions(RunOptions):
    """Distillation.

    Attributes:
        checkpoint: the student: a directory with configuration, tokenizer, image processor and, unless fresh, weights;
            or calf; or, for random weights, a config.json or one of tiny, tiny-text, scout, maverick.
        teacher: directory of the teacher, or of a cache of its targets, or calf. It has to be given.
        fresh: begin with random weights instead of the checkpoint's.
        divergence: between the teacher's distribution and the student's.
        weighting: of soft and hard targets; schedule did best on the calf (docs/training.md).
        soft: largest weight of the soft targets.
        temperature: divides the logits of both.
    """

    checkpoint: Path
    teacher: Path | None = None
    fresh: bool = False
    divergence: Literal["forward", "reverse", "js", "skew"] = "forward"
    weighting: Literal["dynamic", "fixed", "schedule", "confidence", "certainty", "soft_labels", "balance"] = "schedule"
    soft: float = 0.9
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.soft <= 1:
            raise HerdError(f"soft is {self.soft}, it must be within 0 and 1")
        if not 0 < self.temperature < math.inf:
            raise HerdError(f"temperature is {self.temperature}, it must be above 0")


def weighting_of(options: DistilOptions, total: Callable[[Tensor], Tensor]) -> Weighting:
    """The weighting by its name; ``total`` sums a tensor over ranks, so that all of them weigh alike."""
    soft, steps = options.soft, options.train.steps
    known: dict[str, Weighting] = {
        "dynamic": dynamic(steps=steps), "fixed": Fixed(soft), "schedule": Schedule(soft, 0.0, steps),
        "confidence": TeacherConfidence(soft), "certainty": TeacherCertainty(soft),
        "soft_labels": WeightedSoftLabels(soft), "balance": LossRatioBalance(reduce=total),
    }
    return known[options.weighting]


def loss_of(options: DistilOptions, total: Callable[[Tensor], Tensor]) -> DistillationLoss:
    """The distillation loss that options describe; ``total`` as in ``weighting_of``."""
    return DistillationLoss(DIVERGENCES[options.divergence](), weighting_of(options, total), options.temperature)


def teacher_of(options: DistilOptions, files: Path) -> Teacher:
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
                       objective=lambda ranks: Distil(chosen, loss_of(options, ranks.sum_tensor)))
