"""Checkpoints are written while training goes on, and are complete or absent whatever happens meanwhile."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from herdgraph.errors import HerdError
from herdgraph.model.training import checkpoint as checkpoint_module
from herdgraph.model.training.parallel.ranks import Ranks
from herdgraph.model.training.train_options import TrainOptions
from herdgraph.model.training.trainer import Trainer
from support import training_saves_worker
from support.forked_ranks import run_ranks
from support.small_runs import OPTIMIZER, Fixture, model

WORKER = "support.training_saves_worker"


def trainer(directory: Path | None = None, *, steps: int = 8, save_every: int = 3) -> Trainer:
    return Trainer(model(), Fixture(), TrainOptions(steps=steps, save_every=save_every), OPTIMIZER, directory=directory)


def saved(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def wanted() -> list[float]:
    return trainer().fit().losses


def replace_save(monkeypatch: pytest.MonkeyPatch, before: Any) -> None:
    """Call ``before`` in the thread that saves."""
    real = checkpoint_module.state_dict_saver.save

    def save(*arguments: Any, **options: Any) -> Any:
        before()
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint_module.state_dict_saver, "save", save)


def test_a_checkpoint_holds_the_moment_of_the_save_though_training_goes_on(
    wanted: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Event()
    replace_save(monkeypatch, lambda: gate.wait(60))
    run = trainer(tmp_path)

    def on_step(progress: Any, _record: Any) -> None:
        if progress.step == 5:
            assert run.store is not None
            assert run.store.newest() is None, "nothing is complete before all is written"
            gate.set()
        if progress.step == 7:
            raise KeyboardInterrupt

    run.on_step = on_step
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert saved(tmp_path) == ["step-00000003", "step-00000006"], "an interruption waits for what is under way"
    kept = json.loads((tmp_path / "checkpoints" / "step-00000003" / "run.json").read_text())
    assert kept["progress"]["step"] == 3
    assert kept["progress"]["losses"] == wanted[:3]
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000006")
    assert trainer(tmp_path).fit().losses == wanted


def test_one_save_at_a_time_and_the_newest_two_are_kept(
    wanted: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = checkpoint_module._Writer.finish

    def begin() -> None:
        seen.append("begins")
        time.sleep(0.05)

    def finish(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        seen.append("ends")

    replace_save(monkeypatch, begin)
    monkeypatch.setattr(checkpoint_module._Writer, "finish", finish)
    assert trainer(tmp_path, save_every=1).fit().losses == wanted
    assert seen == ["begins", "ends"] * 8
    assert saved(tmp_path) == ["step-00000007", "step-00000008"]


def test_a_failed_save_ends_the_run_before_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    replace_save(monkeypatch, fail)
    run = trainer(tmp_path)
    message = r"step-00000003 cannot be written \(No space left on device\); there is none before it; make room"
    with pytest.raises(HerdError, match=message):
        run.fit()
    assert 3 <= run.state.progress.step <= 6


def test_what_ended_a_run_is_told_rather_than_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Event()

    def fail(*_: Any, **_named: Any) -> None:
        gate.wait(60)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module._Writer, "finish", fail)
    run = trainer(tmp_path)
    blame = run._blame
    monkeypatch.setattr(run, "_blame", lambda batch: (gate.set(), blame(batch))[1])

    def spoil(progress: Any, _record: Any) -> None:
        if progress.step == 4:
            with torch.no_grad():
                run.state.model.decoder.norm.weight[0] = torch.nan

    run.on_step = spoil
    with pytest.raises(HerdError, match=r"step 5: the loss is nan; decoder\.norm is the first"):
        run.fit()
    [told] = [record.message for record in caplog.records if record.name.startswith("herdgraph")]
    assert "step-00000003 cannot be written (No space left on device)" in told


def test_a_place_that_cannot_be_written_is_told_at_the_end_at_the_latest(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(HerdError, match=r"checkpoints/step-00000008 cannot be written \((Not a directory|File exists)"):
        trainer(tmp_path, save_every=0).fit()


def test_what_a_killed_process_left_is_ignored_and_removed(wanted: list[float], tmp_path: Path) -> None:
    assert trainer(tmp_path, steps=3, save_every=0).fit().step == 3
    shutil.copytree(tmp_path / "checkpoints" / "step-00000003", tmp_path / "checkpoints" / "step-00000005.partial")
    run = trainer(tmp_path)
    assert run.store is not None
    assert run.store.newest() == tmp_path / "checkpoints" / "step-00000003"
    assert run.store.restore(run.state)
    assert saved(tmp_path) == ["step-00000003"]


def start(directory: Path, event: str, ranks: int) -> subprocess.CompletedProcess[str]:
    """The run as processes of its own."""
    return run_ranks(ranks, WORKER, str(directory), event)


def losses(directory: Path, ranks: int) -> list[float]:
    """Of the run to its end: a process alone need not be another one for that."""
    if ranks == 1:
        return training_saves_worker.train(directory, "-", Ranks.alone())
    done = start(directory, "-", ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[float]]:
    """Losses by the number of ranks."""
    return cache(lambda ranks: losses(tmp_path_factory.mktemp("whole"), ranks))


@pytest.mark.parametrize(("event", "ranks"), [
    ("full", 1), pytest.param("full", 2, marks=pytest.mark.slow), ("killed", 1)])
def test_a_full_disk_or_a_kill_while_saving_keeps_what_was_there(
    event: str, ranks: int, uninterrupted: Callable[[int], list[float]], tmp_path: Path
) -> None:
    broken = start(tmp_path, event, ranks)
    assert broken.returncode != 0
    if event == "full":
        assert saved(tmp_path) == ["step-00000002"], broken.stderr[-2000:]
        assert ranks > 1 or not broken.stderr, "one line, and nothing of the library beside it"
        for rank in range(ranks):
            assert (f"rank {rank}: checkpoint {tmp_path}/checkpoints/step-00000004 cannot be written (File too large); "
                    f"the last one is {tmp_path}/checkpoints/step-00000002; make room and start again") in broken.stdout
    else:
        assert saved(tmp_path) == ["step-00000002", "step-00000004.partial"]
    assert losses(tmp_path, ranks) == uninterrupted(ranks)
    assert saved(tmp_path) == ["step-00000004", "step-00000006"]
