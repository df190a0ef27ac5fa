"""Plans of several ranks, in real processes: the logits of the whole model, and one error when a rank dies.

TensorRT and CUDA are imitations in the host's memory (``host_tensorrt.py``), NCCL is hollow; the rest is what would run
on GPUs. Plans meet through the communicator that they are given, stages hand on hidden states through NCCL.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from herdgraph.export.pipeline import build_bundle
from herdgraph.export.targets import registry
from herdgraph.export.targets.options import PlanOptions
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.runtimes import Engine
from herdgraph.runtimes.distributed.placement import gpu_of
from support import herds, hollow_nccl
from support.plan_ranks_worker import drive
from support.plan_zip import PLAN_ZIP
from support.processes import worker_environment

SUPPORT = Path(hollow_nccl.__file__).parent
PLAN = "tp=2,pp=2"
"""Collectives inside of plans, and hidden states between them."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    hollow_nccl.compiled(directory)
    herds.save(herds.variant(**herds.TWO_LAYERS), directory / "checkpoint")
    options = PlanOptions(context=256, batch=9)
    with pytest.MonkeyPatch.context() as patch, open_checkpoint(directory / "checkpoint") as checkpoint:
        patch.setitem(registry.TARGETS, PLAN_ZIP.name, PLAN_ZIP)
        build_bundle(checkpoint, directory / "whole", target="cpu-stock")
        build_bundle(checkpoint, directory / PLAN, target=PLAN_ZIP.name, recipe="bf16", options=options,
                     shards=ShardPlan.parse(PLAN))
    return directory


def _run(directory: Path, behaviour: str) -> list[str]:
    """What rank 0 prints."""
    environment = worker_environment() | hollow_nccl.environment(directory / hollow_nccl.NAME)
    environment["PYTHONPATH"] = os.pathsep.join((str(SUPPORT / "stand_ins"), environment["PYTHONPATH"]))
    arguments = str(directory / PLAN), str(directory / "found.npz"), behaviour
    command = [sys.executable, "-m", "support.plan_ranks_worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_logits_of_the_whole_model(directory: Path) -> None:
    assert _run(directory, "drive") == [
        "300 tokens are more than the 256 that the plan was built for: build it with other limits",
        "batch is 10, the plan was built for 1 to 9: build it with other limits", "Nccl"]
    wanted = drive(Engine.load(directory / "whole", threads=1))
    with np.load(directory / "found.npz") as found:
        for name, logits in zip(found.files, wanted, strict=True):
            np.testing.assert_allclose(found[name], logits, atol=1e-4)


def test_a_killed_rank(directory: Path) -> None:
    (said,) = _run(directory, "kill")
    found = re.match(r"(\d+\.\d) s: rank 1 \(process \d+\) was killed by SIGKILL.*; load the bundle again", said)
    assert found, said
    assert float(found[1]) < 5


@pytest.mark.parametrize(("visible", "local", "gpu"), [
    (None, None, 3), (None, "1", 1), ("2", "1", 0), ("0,1", None, 3),
])
def test_the_gpu_of_a_rank(monkeypatch: pytest.MonkeyPatch, visible: str | None, local: str | None, gpu: int) -> None:
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("LOCAL_RANK", local)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert gpu_of(3) == gpu


