"""Ranks of the target ``cuda`` in real processes on a CPU: the logits of the whole model, whatever the plan.

Graphs are float32 twins, NCCL is hollow and sums in the host's memory; see ``cuda_twin_site``. What runs on the GPU's
provider itself is seen in ``tests/cuda/test_ranks.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from herdgraph.calibration.calibrate import Options, calibrate
from herdgraph.calibration.windows import Data, Window
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.targets import registry
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.model.quantization.recipes import RECIPES, Caches
from herdgraph.runtimes import Engine
from support import herds, hollow_nccl
from support.cuda_rank_twin import CUDA_TWIN
from support.cuda_ranks_worker import pictures
from support.plan_ranks_worker import drive, tokens
from support.processes import worker_environment

PLANS = ["tp=2", "ep=2", "pp=2", "tp=2,pp=2"]
OTHERS: dict[str, tuple[str, str, Caches, float]] = {
    "pictures": ("tp=2", "fp32", "float", 1e-5), "codes": ("ep=2", "int8", "int8", 0.1),
    "nibbles": ("tp=2", "int4", "float", 0.3), "caches": ("pp=2", "fp32", "int8", 0.1),
}
"""Plan, recipe, caches, and how far logits are from those in float32, in standard deviations."""


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


@pytest.fixture(scope="module")
def others(directory: Path) -> Path:
    """Bundles that see pictures, with weights and caches in fewer bits."""
    herds.save(herds.variant(vision=True, **herds.TWO_LAYERS), directory / "sees")
    calibration = directory / "calibration"
    with pytest.MonkeyPatch.context() as patch, open_checkpoint(directory / "sees") as checkpoint:
        patch.setitem(registry.TARGETS, CUDA_TWIN.name, CUDA_TWIN)
        calibrate(checkpoint, calibration, Data([Window(herds.tokens(100, seed)) for seed in (8, 9)], []),
                  Options(hessians=False))
        build_bundle(checkpoint, directory / "whole-pictures", target="cpu-stock")
        for name, (plan, recipe, caches, _) in OTHERS.items():
            build_bundle(checkpoint, directory / name, target=CUDA_TWIN.name, shards=ShardPlan.parse(plan),
                         recipe=replace(RECIPES[recipe], caches=caches),
                         calibration=calibration if caches != "float" else None)
    return directory


def run(directory: Path, names: Iterable[str]) -> str:
    """Drive bundles, each with its ranks; returns what was printed."""
    environment = worker_environment() | hollow_nccl.environment(directory / hollow_nccl.NAME)
    site = Path(hollow_nccl.__file__).with_name("cuda_twin_site")
    environment["PYTHONPATH"] = os.pathsep.join((str(site), environment["PYTHONPATH"]))
    done = subprocess.run(
        [sys.executable, "-m", "support.cuda_ranks_worker", str(directory), *(str(directory / name) for name in names)],
        capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_logits_of_the_whole_model(directory: Path) -> None:
    """Prompts and tokens across chunks, batches in parts, forks, truncation."""
    printed = run(directory, PLANS)
    assert printed.splitlines() == ["Nccl 0", "Nccl 0", "Nccl 1", "Nccl 1"], "a pipeline gives logits back"
    whole = Engine.load(directory / "whole", threads=1)
    wanted, sequence = drive(whole), whole.new_sequence()
    whole.prefill(sequence, tokens(5))
    best = whole.decode(sequence, 7).argmax()
    for plan in PLANS:
        with np.load(directory / f"{plan}.npz") as found:
            assert found["best"] == best
            for index, logits in enumerate(wanted):
                np.testing.assert_allclose(found[f"arr_{index}"], logits, atol=1e-4, err_msg=f"{plan} {index}")


@pytest.mark.slow
def test_pictures_integers_and_caches_in_8_bits(others: Path) -> None:
    """Exact in float32; as near as rounding lets them in fewer bits, where a wrong slice would be far off."""
    run(others, OTHERS)
    with Engine.load(others / "whole-pictures", threads=1) as whole:
        wanted = np.concatenate([logits.reshape(-1) for logits in (*drive(whole), *pictures(whole))])
    for name, (*_, bound) in OTHERS.items():
        with np.load(others / f"{name}.npz") as found:
            logits = np.concatenate([found[key].reshape(-1) for key in sorted(
                (key for key in found if key != "best"), key=lambda key: int(key.removeprefix("arr_")))])
        gap = float(np.sqrt(np.mean((logits - wanted) ** 2)) / wanted.std())
        assert gap < bound, f"{name}: {gap}"
