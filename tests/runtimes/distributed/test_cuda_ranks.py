"""Ranks of the target ``cuda`` in real processes on a CPU: the logits of the whole model, whatever the plan.

Graphs are float32 twins, NCCL is hollow and sums in the host's memory; see ``cuda_twin_site``. What runs on the GPU's
provider itself is seen in ``tests/cuda/test_ranks.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from herdgraph.export.pipeline import build_bundle
from herdgraph.export.targets import registry
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.model.quantization.recipes import RECIPES
from herdgraph.runtimes import Engine
from support import herds, hollow_nccl
from support.cuda_rank_twin import CUDA_TWIN
from support.plan_ranks_worker import drive, tokens
from support.processes import worker_environment

PLANS = ["tp=2", "ep=2", "pp=2", "tp=2,pp=2"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not hasattr(onnxruntime.OrtValue, "from_dlpack"):
        pytest.skip("this onnxruntime takes no parts of values, which came with 1.31")
    directory = tmp_path_factory.mktemp("ranks")
    hollow_nccl.compiled(directory)
    herds.save(herds.variant(**herds.TWO_LAYERS), directory / "checkpoint")
    with pytest.MonkeyPatch.context() as patch, open_checkpoint(directory / "checkpoint") as checkpoint:
        patch.setitem(registry.TARGETS, CUDA_TWIN.name, CUDA_TWIN)
        build_bundle(checkpoint, directory / "whole", target="cpu-stock")
        for plan in PLANS:
            build_bundle(checkpoint, directory / plan, target=CUDA_TWIN.name, recipe=RECIPES["fp32"],
                         shards=ShardPlan.parse(plan))
    return directory


def test_logits_of_the_whole_model(directory: Path) -> None:
    """Prompts and tokens across chunks, batches in parts, forks, truncation."""
    environment = worker_environment() | hollow_nccl.environment(directory / hollow_nccl.NAME)
    site = Path(hollow_nccl.__file__).with_name("cuda_twin_site")
    environment["PYTHONPATH"] = os.pathsep.join((str(site), environment["PYTHONPATH"]))
    done = subprocess.run(
        [sys.executable, "-m", "support.cuda_ranks_worker", str(directory), *(str(directory / plan) for plan in PLANS)],
        capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["Nccl 0", "Nccl 0", "Nccl 1", "Nccl 1"], "a pipeline gives logits back"
    whole = Engine.load(directory / "whole", threads=1)
    wanted, sequence = drive(whole), whole.new_sequence()
    whole.prefill(sequence, tokens(5))
    best = whole.decode(sequence, 7).argmax()
    for plan in PLANS:
        with np.load(directory / f"{plan}.npz") as found:
            assert found["best"] == best
            for index, logits in enumerate(wanted):
                np.testing.assert_allclose(found[f"arr_{index}"], logits, atol=1e-4, err_msg=f"{plan} {index}")
