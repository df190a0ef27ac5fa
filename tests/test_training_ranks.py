"""Training over real processes (gloo): the losses of one process, also after a rank was killed or on fewer ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from herdgraph.model.config import HerdConfig

WORKER = Path(__file__).parent / "training_worker.py"


def run(ranks: int, directory: Path | str = "-", steps: int = 6, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.run([sys.executable, *start, str(WORKER), str(directory), str(steps), str(kill_at)],
                          capture_output=True, text=True, check=False, env=environment, timeout=240)


def losses(done: subprocess.CompletedProcess[str]) -> list[float]:
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def alone() -> list[float]:
    return losses(run(1))


def test_two_ranks_have_the_losses_of_one(alone: list[float]) -> None:
    assert losses(run(2)) == pytest.approx(alone, rel=1e-4)


def test_a_killed_rank_ends_the_run_and_a_restart_goes_on(alone: list[float], tmp_path: Path) -> None:
    killed = run(2, tmp_path, kill_at=5)
    assert killed.returncode != 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*[0-9]"))[-1] == "step-00000004"
    assert losses(run(2, tmp_path)) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_the_train_command_on_two_ranks_writes_a_whole_model(tmp_path: Path, precision: str) -> None:
    import herds
    from herdgraph.export.calibration_file import CalibrationFile
    from herdgraph.model.checkpoint import open_checkpoint
    from herdgraph.model.presets import TINY

    herds.save(HerdConfig(text=TINY.text), tmp_path / "checkpoint")
    herds.write_processor(tmp_path / "checkpoint")
    rows = [{"text": f"The herd of {number} grazes on the green hill. "} for number in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_ = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "herdgraph",
         "train", "pretrain", f"checkpoint={tmp_path / 'checkpoint'}", f"data={tmp_path / 'data.jsonl'}",
         f"output={run_}", "rows=1", "seq_len=64", "train.steps=3", "optimizer.ema=0.5", "held_out=0.2",
         f"train.precision={precision}"],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    with open_checkpoint(run_ / "model") as trained, open_checkpoint(tmp_path / "checkpoint") as before:
        name = "layers.1.feed_forward.experts.down_proj"
        assert trained.read(name).shape == before.read(name).shape
        assert not torch.equal(trained.read(name), before.read(name).bfloat16())
        if precision == "fp8":
            assert CalibrationFile.open(run_ / "calibration", trained.fingerprint()).input_amax(name).min() > 0


def test_two_ranks_go_on_as_one(alone: list[float], tmp_path: Path) -> None:
    assert run(2, tmp_path, kill_at=5).returncode != 0
    assert losses(run(1, tmp_path)) == pytest.approx(alone, rel=1e-3)
