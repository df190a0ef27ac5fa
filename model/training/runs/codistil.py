"""Codistillation: several students and their teacher in one run, which computes the teacher's forward pass once.

For every batch the teacher goes first. Trained itself, it takes its own step, and what its forward pass gave for that
step is what the students learn from: distillation then costs no pass of the teacher at all, as when Llama 4 Behemoth
was trained beside Maverick. All see the same batches; each has its own optimizer, records and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from ....errors import HerdError
from ..distill import ModuleTeacher, RecentTargets, SharedTeacher, Teacher, require_tokenizer, tokenizer_hash
from ..objective import Distil, Objective, Teach, logits_of
from ..parallel.ranks import Ranks
from ..state import TrainProgress
from ..trainer import Trainer, fit_together
from .distil import DistilOptions, TeacherOptions, loss_of, teacher_of
from .run import OnStep, trainer_of, write_model
from .start import Start, start_of


@dataclass(frozen=True, kw_only=True)
class CodistilOptions(TeacherOptions):
    """Codistillation.

    Attributes:
        students: checkpoints of the students, as for distil; written to student-1, student-2, ... in the output.
        fresh: begin with random weights instead of the checkpoints'; a teacher that learns, too.
        teacher_learns: train the teacher in the same run, on next tokens; it is written to teacher in the output.
    """

    students: tuple[Path, ...]
    fresh: bool = False
    teacher_learns: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.students:
            raise HerdError("codistillation needs students: name their checkpoints (--students)")
        if self.teacher is None:
            raise HerdError("codistillation needs a teacher: name a checkpoint (--teacher)")

    @property
    def model(self) -> Path:
        """Where the first student is written."""
        return self.output / "student-1" / "model"


class _Member(NamedTuple):
    """A model of the run: what ``write_model`` takes."""

    trainer: Trainer
    options: DistilOptions
    files: Path


def codistil(options: CodistilOptions, on_step: OnStep | None = None) -> TrainProgress:
    """Train several students by one teacher.

    Args:
        options: of the run.
        on_step: called after each step of the first student.

    Returns:
        Progress of the first student.

    Raises:
        HerdError: a student has another tokenizer than the teacher, or as ``train_model``.
    """
    ranks, recent = Ranks.from_environment(options.parallel), RecentTargets(options.train.accumulate)
    names = [f"student-{number}" for number in range(1, len(options.students) + 1)]
    starts = [start_of(checkpoint, options.output / name, fresh=options.fresh)
              for name, checkpoint in zip(names, options.students, strict=True)]
    members = [_learning_teacher(options, recent, ranks)] if options.teacher_learns else []
    teacher = SharedTeacher(_teacher(options, starts, members), recent)
    for name, start in zip(names, starts, strict=True):
        objective = Distil(teacher, loss_of(options))
        members.append(_member(options, name, start, ranks, objective, on_step if name == names[0] else None))
    fit_together([member.trainer for member in members])
    for member in members:
        write_model(*member)
    ranks.close()
    return members[-len(names)].trainer.state.progress


def _learning_teacher(options: CodistilOptions, recent: RecentTargets, ranks: Ranks) -> _Member:
    assert options.teacher is not None, "it is checked when the options are made"
    start = start_of(options.teacher, options.output / "teacher", fresh=options.fresh)
    return _member(options, "teacher", start, ranks, Teach(recent))


def _teacher(options: CodistilOptions, starts: list[Start], learning: list[_Member]) -> Teacher:
    """What answers where a batch's targets are not kept, once every student has the teacher's tokenizer."""
    found = (ModuleTeacher(learning[0].trainer.state.model, logits_of) if learning
             else teacher_of(options, starts[0].files))
    wanted = tokenizer_hash(learning[0].files if learning else starts[0].files)
    for start in starts:
        require_tokenizer(wanted, tokenizer_hash(start.files))
    return found


def _member(
    options: CodistilOptions, name: str, start: Start, ranks: Ranks, objective: Objective, on_step: OnStep | None = None
) -> _Member:
    """A model as if it were trained alone, in a directory of its own."""
    shared = {field.name: getattr(options, field.name) for field in fields(TeacherOptions)}
    own = DistilOptions(**shared | {"output": options.output / name}, checkpoint=start.files)
    trainer = trainer_of(start.model(own.train.seed), own, start.files, ranks, objective=objective, on_step=on_step)
    return _Member(trainer, own, start.files)

