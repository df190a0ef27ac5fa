"""Ranks on hollow devices, one process each, over a hollow NCCL: what a token costs, and how all end when one fails.

Their numbers are checked on a CPU, in ``tests/runtimes/distributed/test_cuda_ranks.py``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from herdgraph.calibration.calibrate import Options, calibrate
from herdgraph.calibration.windows import Data, Window
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.model.quantization.recipes import RECIPES
from support import herds, hollow_nccl
from support.hollow_cuda.engine import run_engine
from support.hollow_cuda.libraries import UnavailableError
from support.hollow_cuda.report import Report

pytestmark = pytest.mark.slow

PLANS = ["tp=2", "ep=2", "pp=2", "tp=2,pp=2"]
SUMS = 1 + 2 * len(herds.TWO_LAYERS["rope_layers"])
"""After the embedding, attention and feed-forward."""
LOAD = """
import json, os, signal, threading, time
engine = Engine.load(ARGUMENTS[0], gpu_memory=2 << 30, threads=1, timeout=ARGUMENTS[1])
runner, sequence = engine.runner, engine.new_sequence()
engine.prefill(sequence, [3, 4, 5])
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    hollow_nccl.compiled(directory)
    herds.save(herds.variant(**herds.TWO_LAYERS, attention_chunk_size=128), directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        for plan in PLANS:
            build_bundle(checkpoint, directory / plan, target="cuda", recipe=RECIPES["bf16"],
                         shards=ShardPlan.parse(plan))
    return directory


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles in integers, which kernels take in multiples of 64."""
    directory = tmp_path_factory.mktemp("codes")
    hollow_nccl.compiled(directory)
    config = herds.variant(vision=True, **herds.TWO_LAYERS, attention_chunk_size=128, hidden_size=128, num_heads=4,
                           num_kv_heads=2, head_dim=64, expert_size=128, dense_size=256)
    herds.save(config, directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        calibrate(checkpoint, directory / "calibration", Data([Window(herds.tokens(100))], []),
                  Options(hessians=False))
        for plan in PLANS[:3]:
            build_bundle(checkpoint, directory / plan, target="cuda", recipe=replace(RECIPES["int8"], caches="int8"),
                         calibration=directory / "calibration", shards=ShardPlan.parse(plan))
    return directory


def on_devices(
    directory: Path, plan: str, code: str, *, fault: str = "", timeout: float = 30
) -> tuple[list[Any], dict[str, Report]]:
    """What rank 0 prints, and what it did to its device."""
    ranks = hollow_nccl.environment(directory / hollow_nccl.NAME, fault) | {"HOLLOW_CUDA_DEVICES": "4"}
    try:
        return run_engine(LOAD + code, str(directory / plan), timeout, environment=ranks)
    except UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("plan", PLANS)
def test_a_token_is_one_upload_and_one_replay(directory: Path, plan: str) -> None:
    """Exchanges are part of the recorded graph, and only logits that somebody reads leave a device."""
    (ended,), found = on_devices(directory, plan, """
runner.warm_up(4)
mark("token")
engine.decode(sequence, 5)
mark("greedy")
runner.decode_greedy(sequence, 5)
mark("others")
batch = [engine.new_sequence() for _ in range(9)]
for one in batch:
    engine.prefill(one, [3] * 5)
batch[0] = batch[1].fork()
engine.decode_batch(batch, [5] * 9)  # writes to blocks that two share: they are copied on every rank
engine.truncate(batch[0], 2)
started = runner.processes.started.values()
engine.close()
print(json.dumps([process.poll() for process in started]))
""")
    assert set(ended) == {0}
    token, stages = found["token"], ShardPlan.parse(plan).pipeline
    (replay,) = token.of("replay")
    width = ShardPlan.parse(plan).width
    assert replay["exchanges"] == (0 if width == 1 else SUMS + 1 if stages == 1 else SUMS // stages + 1)
    assert not token.launches, token.summary()
    assert not token.allocations, token.summary()
    assert len(token.copies("host", "device")) == 1
    read = [event["bytes"] for event in token.copies("device", "host")]
    assert read == ([4 * TINY.text.vocab_size] if stages == 1 else [])
    assert [event["bytes"] for event in found["greedy"].copies("device", "host")] == ([8] if stages == 1 else [])
    assert found["others"].launches


@pytest.mark.parametrize("plan", ["tp=2", "ep=2", "pp=2"])
def test_pictures_integers_and_caches_in_8_bits(narrow: Path, plan: str) -> None:
    """A bundle of recipe int8 that sees pictures, its keys and values in int8: what a token costs is the same."""
    (length,), found = on_devices(narrow, plan, """
import numpy as np
vision = engine.config.vision
tile = np.zeros((1, 3, vision.image_size, vision.image_size), np.float32)
engine.prefill(sequence, [7, *[engine.config.image_token_id] * vision.tokens_per_tile, 9], tile)
runner.warm_up(2)
mark("token")
engine.decode(sequence, 5)
mark("end")
print(json.dumps(len(sequence)))
""")
    assert length == 3 + 2 + TINY.vision.tokens_per_tile + 1  # type: ignore[union-attr]
    (replay,) = found["token"].of("replay")
    assert bool(replay["exchanges"]) == (plan != "pp=2")
    assert not found["token"].launches, found["token"].summary()
    assert not found["token"].allocations, found["token"].summary()


@pytest.mark.parametrize(("harm", "fault", "said", "seconds"), [
    ("os.kill(rank.pid, signal.SIGKILL)", "", r"rank 1 \(process \d+\) was killed by SIGKILL[^\n]*", 4),
    ("os.kill(rank.pid, signal.SIGSTOP)", "", r"rank 1[^:]* has kept the others waiting for 4 s[^\n]*", 12),
    ("None", "40:count@1", r"rank \d has waited for 4 s in an exchange that all have begun[^\n]*", 12),
], ids=["killed", "stalled", "mismatched"])
def test_a_rank_that_fails_ends_all(directory: Path, harm: str, fault: str, said: str, seconds: float) -> None:
    (found,), _ = on_devices(directory, "tp=2", f"""
rank = runner.processes.started[1]
threading.Timer(0.3, lambda: {harm}).start()
began = harmed = time.monotonic()
try:
    while time.monotonic() - began < 60:
        harmed = time.monotonic()
        engine.decode(sequence, 5)
        engine.truncate(sequence, 3)
except Exception as error:
    print(json.dumps([str(error), time.monotonic() - harmed, rank.poll() is None]))
""", fault=fault, timeout=4)
    message, took, lives = found
    assert re.fullmatch(said + "; load the bundle again", message), message
    assert took < seconds
    assert not lives
