"""Several students and their teacher in one run: one pass of the teacher, and each model as if it were alone."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from herdgraph.errors import HerdError
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.training.data import Batch
from herdgraph.model.training.distill import (
    DistillationLoss,
    Fixed,
    ModuleTeacher,
    RecentTargets,
    SharedTeacher,
    Teacher,
)
from herdgraph.model.training.objective import Distil, Objective, Teach, logits_of
from herdgraph.model.training.runs import CodistilOptions, codistil
from herdgraph.model.training.runs.start import open_model
from herdgraph.model.training.train_options import TrainOptions
from herdgraph.model.training.trainer import Trainer, fit_together
from support import herds
from support.small_runs import OPTIMIZER, Fixture, model

STEPS = TrainOptions(steps=4)


def trainer(
    seed: int, objective: Objective | None = None, directory: Path | None = None, options: TrainOptions = STEPS
) -> Trainer:
    return Trainer(model(seed), Fixture(), options, OPTIMIZER, objective=objective, directory=directory)


def taught(teacher: Teacher) -> Distil:
    return Distil(teacher, DistillationLoss(weighting=Fixed(0.5)))


class Passes:
    """Logits of a module, and how often they were asked for."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        self.count += 1
        return logits_of(module, batch)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_teacher_answers_once_and_every_student_learns_as_if_it_were_alone(accumulate: int) -> None:
    options, passes = replace(STEPS, accumulate=accumulate), Passes()
    shared = SharedTeacher(ModuleTeacher(model(7), passes), RecentTargets(accumulate))
    students = [trainer(seed, taught(shared), options=options) for seed in (1, 2)]
    fit_together(students)
    assert passes.count == 4 * accumulate
    for seed, student in zip((1, 2), students, strict=True):
        alone = trainer(seed, taught(ModuleTeacher(model(7), logits_of)), options=options).fit()
        assert student.state.progress.losses == alone.losses


def learning(directory: Path | None = None) -> tuple[Trainer, Trainer]:
    """A teacher that learns, and its student."""
    recent = RecentTargets()
    places = (None, None) if directory is None else (directory / "teacher", directory / "student")
    teacher = trainer(7, Teach(recent), places[0])
    asked = ModuleTeacher(teacher.state.model, logits_of)
    return teacher, trainer(1, taught(SharedTeacher(asked, recent)), places[1])


def test_a_teacher_that_learns_teaches_what_it_knew_when_the_step_began() -> None:
    teacher, student = learning()
    fit_together([teacher, student])
    assert teacher.state.progress.losses == trainer(7).fit().losses, "students cost a teacher nothing"
    first = trainer(1, taught(ModuleTeacher(model(7).train(), logits_of)), options=TrainOptions(steps=1)).fit().losses
    assert student.state.progress.losses[:1] == first
    frozen = trainer(1, taught(ModuleTeacher(model(7), logits_of))).fit().losses
    assert student.state.progress.losses[3] != frozen[3], "it has learned since"


def test_all_are_saved_at_one_step_and_who_is_behind_catches_up(tmp_path: Path) -> None:
    wanted = learning()
    fit_together(wanted)
    run = learning(tmp_path)
    run[1].on_step = lambda progress, _record: signal.raise_signal(signal.SIGINT) if progress.step == 2 else None
    with pytest.raises(KeyboardInterrupt):
        fit_together(run)
    saved = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("*/checkpoints/*"))
    assert saved == [Path(name, "checkpoints", "step-00000002") for name in ("student", "teacher")]
    shutil.rmtree(tmp_path / "teacher" / "checkpoints")
    run = learning(tmp_path)
    order: list[str] = []
    for name, each in zip(("teacher", "student"), run, strict=True):
        each.on_step = lambda _progress, _record, name=name: order.append(name)
    fit_together(run)
    assert order == ["teacher"] * 2 + ["teacher", "student"] * 2
    for each, whole in zip(run, wanted, strict=True):
        assert each.state.progress.losses == whole.state.progress.losses


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint and a text."""
    directory = tmp_path_factory.mktemp("codistil")
    herds.save(HerdConfig(text=TINY.text), directory / "checkpoint")
    herds.write_processor(directory / "checkpoint")
    rows = [{"text": f"The herd of {number} grazes on the green hill. "} for number in range(20)]
    (directory / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


def options(files: Path, output: Path, **changes: Any) -> CodistilOptions:
    return CodistilOptions(**{
        "students": (files / "checkpoint",) * 2, "teacher": files / "checkpoint", "data": (files / "data.jsonl",),
        "output": output, "rows": 1, "seq_len": 64, "held_out": 0, "train": TrainOptions(steps=2), **changes})


@pytest.mark.parametrize("teacher_learns", [False, True])
def test_a_run_writes_every_model_that_learned(files: Path, tmp_path: Path, teacher_learns: bool) -> None:
    wanted = options(files, tmp_path, teacher_learns=teacher_learns)
    seen: list[int] = []
    assert codistil(wanted, lambda progress, _record: seen.append(progress.step)).step == 2
    assert seen == [1, 2]
    names = {"student-1", "student-2"} | ({"teacher"} if teacher_learns else set())
    assert {path.name for path in tmp_path.iterdir()} == names
    first, second = (open_model(tmp_path / name / "model").state_dict() for name in ("student-1", "student-2"))
    assert all(torch.equal(value, second[name]) for name, value in first.items()), "they began alike"
    assert wanted.model.is_dir()


def test_no_student_no_teacher_and_another_tokenizer_are_refused(files: Path, tmp_path: Path) -> None:
    for name, message in (("students", "name their checkpoints"), ("teacher", "name a checkpoint")):
        with pytest.raises(HerdError, match=message):
            options(files, tmp_path, **{name: () if name == "students" else None})
    shutil.copytree(files / "checkpoint", tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": {"type": "NFC"}}))
    for learns in (False, True):
        with pytest.raises(HerdError, match="distil between models with the same tokenizer"):
            codistil(options(files, tmp_path / "run", students=(files / "checkpoint", tmp_path / "other"),
                             teacher_learns=learns))
