"""A run that is asked to end saves first; time, too, is a reason to save."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import pytest

from herdgraph.errors import HerdError
from herdgraph.model.training.train_options import TrainOptions
from herdgraph.model.training.trainer import Trainer
from support.small_runs import OPTIMIZER, Fixture, model


def trainer(directory: Path, **options: Any) -> Trainer:
    return Trainer(model(), Fixture(), TrainOptions(**{"steps": 6, **options}), OPTIMIZER, directory=directory)


def saved(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def test_an_interrupted_run_is_saved_and_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    wanted = trainer(tmp_path / "whole").fit().losses
    run = trainer(tmp_path / "run")
    run.on_step = lambda progress, _record: signal.raise_signal(signal.SIGINT) if progress.step == 2 else None
    with pytest.raises(KeyboardInterrupt) as caught:
        run.fit()
    assert caught.value.__notes__ == [
        f"step 2 of 6 is saved in {tmp_path}/run/checkpoints, the same command goes on from there"]
    assert saved(tmp_path / "run") == ["step-00000002"]
    assert trainer(tmp_path / "run").fit().losses == wanted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_signal_acts_at_once(tmp_path: Path) -> None:
    run = trainer(tmp_path)

    def twice(_progress: Any, _record: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    run.on_step = twice
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_saves_by_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="herdgraph"):
        trainer(tmp_path, save_minutes=1e-9).fit()
        trainer(tmp_path, steps=8).fit()
        trainer(tmp_path, steps=8).fit()
    assert [text for text in caplog.messages if text.startswith("saving")] == [
        f"saving step {step} of 6 in {tmp_path}/checkpoints" for step in range(1, 6)]
    [resumed] = [text for text in caplog.messages if "resuming" in text]
    assert resumed.startswith("resuming from step 6 of 8, saved 20")
    assert resumed.endswith(f"{tmp_path}/checkpoints/step-00000006")


@pytest.mark.parametrize("name", ["save_minutes", "save_every", "evaluate_every", "seed", "steps"])
def test_numbers_below_zero_are_refused(name: str) -> None:
    with pytest.raises(HerdError, match=f"^train.{name} is -1, it must be at least 0$"):
        TrainOptions(**{name: -1})


def test_not_a_number_is_refused() -> None:
    with pytest.raises(HerdError, match="save_minutes is nan"):
        TrainOptions(save_minutes=float("nan"))
