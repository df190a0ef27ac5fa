"""Sharded engines over real processes: the logits and texts of the whole engine, whatever is done with sequences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.runtimes import Engine, Sequence
from support import herds
from support.forked_ranks import run_ranks

CHUNK = TINY.text.attention_chunk_size
PLANS = ["tp=2", "ep=2", "pp=2", "tp=2,pp=2"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    herds.save(TINY, directory / "checkpoint")
    herds.write_processor(directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        build_bundle(checkpoint, directory / "whole")
        for plan in PLANS:
            build_bundle(checkpoint, directory / plan, shards=ShardPlan.parse(plan))
    return directory


@pytest.fixture(scope="module")
def whole(directory: Path) -> Engine:
    return Engine.load(directory / "whole", threads=1)


@pytest.fixture(scope="module", params=PLANS)
def sharded(directory: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine.load(directory / request.param, threads=1) as engine:
        yield engine


def _close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def _both(whole: Engine, sharded: Engine, count: int, seed: int = 0) -> tuple[Sequence, Sequence]:
    """The same tokens in both engines; the logits of all positions are equal."""
    sequences = whole.new_sequence(), sharded.new_sequence()
    ids = herds.tokens(count, seed)
    _close(sharded.prefill(sequences[1], ids, all_positions=True), whole.prefill(sequences[0], ids, all_positions=True))
    return sequences


def test_prompts_and_tokens(whole: Engine, sharded: Engine) -> None:
    ours, theirs = _both(whole, sharded, 3 * CHUNK + 5)
    for token in herds.tokens(2 * CHUNK, seed=1):
        _close(sharded.decode(theirs, token), whole.decode(ours, token))


@pytest.mark.parametrize("length", [0, CHUNK - 1, CHUNK + 5, 2 * CHUNK, 47, 50])
def test_truncation_on_every_rank(length: int, whole: Engine, sharded: Engine) -> None:
    ours, theirs = _both(whole, sharded, 50)
    whole.truncate(ours, length)
    sharded.truncate(theirs, length)
    more = herds.tokens(20, seed=9)
    _close(sharded.prefill(theirs, more, all_positions=True), whole.prefill(ours, more, all_positions=True))


def test_forks_are_independent_on_every_rank(whole: Engine, sharded: Engine) -> None:
    ours, theirs = _both(whole, sharded, 21)
    our_twin, their_twin = ours.fork(), theirs.fork()
    for token in herds.tokens(CHUNK, seed=4):
        sharded.decode(theirs, token)
        whole.decode(ours, token)
    _close(sharded.decode(their_twin, 7), whole.decode(our_twin, 7))
    _close(sharded.decode(theirs, 7), whole.decode(ours, 7))


@pytest.mark.parametrize("lengths", [[3, 40], [3, 40, 15, 16, 1, 30, 17, 9, 12], [3, 5, 7, 9, 3, 5, 7, 9]])
def test_batches_of_any_lengths(lengths: list[int], whole: Engine, sharded: Engine) -> None:
    pairs = [_both(whole, sharded, length, seed) for seed, length in enumerate(lengths)]
    ours, theirs = [list(side) for side in zip(*pairs, strict=True)]
    for step in range(CHUNK + 2):
        tokens = herds.tokens(len(lengths), 100 + step)
        _close(sharded.decode_batch(theirs, tokens), whole.decode_batch(ours, tokens))
    ours[0], theirs[0] = ours[1].fork(), theirs[1].fork()
    for token in (5, 6):
        _close(sharded.decode_batch(theirs, [token] * len(lengths)), whole.decode_batch(ours, [token] * len(lengths)))
    _close(sharded.decode(theirs[-1], 9), whole.decode(ours[-1], 9))


def test_long_prompts_in_pieces(whole: Engine, sharded: Engine) -> None:
    ours, theirs = whole.new_sequence(), sharded.new_sequence()
    ids = herds.tokens(700)
    _close(sharded.prefill(theirs, ids), whole.prefill(ours, ids))
    _close(sharded.decode(theirs, 5), whole.decode(ours, 5))


def test_pictures(whole: Engine, sharded: Engine) -> None:
    image = [TINY.image_token_id] * 4
    ids = herds.tokens(3) + image + herds.tokens(2) + image + herds.tokens(2 * CHUNK)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 28, 28)).astype(np.float32)
    ours, theirs = whole.new_sequence(), sharded.new_sequence()
    _close(sharded.prefill(theirs, ids, pixels), whole.prefill(ours, ids, pixels))
    for engine, sequence in ((whole, ours), (sharded, theirs)):
        engine.truncate(sequence, 8)  # a picture is run again
    _close(sharded.prefill(theirs, ids[8:], pixels[1:]), whole.prefill(ours, ids[8:], pixels[1:]))
    question = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (40, 28), "red")},
                                             {"type": "text", "text": "What is this?"}]}]
    options = {"max_new_tokens": 12, "stop_ids": []}
    assert sharded.generate(question, **options).token_ids == whole.generate(question, **options).token_ids


def test_texts_and_prefix_reuse(whole: Engine, sharded: Engine) -> None:
    options = {"max_new_tokens": 24, "stop_ids": []}
    sequences = whole.new_sequence(), sharded.new_sequence()
    for prompt in ("Once upon a time", "Once upon a hill"):
        wanted, found = (engine.generate(prompt, sequence=sequence, **options)
                         for engine, sequence in zip((whole, sharded), sequences, strict=True))
        assert found.text == wanted.text
        assert found.token_ids == wanted.token_ids
        assert found.timings.cached_tokens == wanted.timings.cached_tokens


# -- loading ---------------------------------------------------------------------------------------------------------


def test_devices_are_cores(directory: Path) -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    try:
        with Engine.load(directory / "tp=2", threads=1, devices=[f"{core}", f"{core}-{core}"]) as engine:
            [process] = engine._decoder.processes.started.values()
            assert os.sched_getaffinity(process.pid) == {core}
    finally:
        os.sched_setaffinity(0, before)
    with pytest.raises(HerdError, match="1 devices were given, the bundle is split for 2"):
        Engine.load(directory / "tp=2", devices=["0"])
    with pytest.raises(HerdError, match="'x' is no list of cores"):
        Engine.load(directory / "tp=2", devices=["0", "x"])
    with pytest.raises(HerdError, match="is not sharded"):
        Engine.load(directory / "whole", devices=["0"])


def test_each_rank_checks_its_own_files(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", directory / "tp=2", copy], check=True)
    data = copy / "rank1" / "decoder.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x01")
    with pytest.raises(HerdError, match=r"rank 1.*rank1/decoder.data was altered"):
        Engine.load(copy, threads=1)
    Engine.load(copy, threads=1, verify=False).close()


def test_ranks_use_weights_as_they_lie_in_the_bundle(directory: Path, whole: Engine) -> None:
    with Engine.load(directory / "tp=2", threads=1, memory="low") as engine:
        found = engine.generate("Once upon", max_new_tokens=8).token_ids
    assert found == whole.generate("Once upon", max_new_tokens=8).token_ids


def test_a_closed_engine_says_so(directory: Path) -> None:
    with Engine.load(directory / "tp=2", threads=1) as engine:
        processes = list(engine._decoder.processes.started.values())
        sequence = engine.new_sequence()
    assert [process.returncode for process in processes] == [0]
    with pytest.raises(HerdError, match="the engine was closed: load the bundle again"):
        engine.decode(sequence, 5)


def test_commands_take_sharded_bundles(directory: Path, whole: Engine) -> None:
    command = [sys.executable, "-m", "herdgraph", "generate", str(directory / "tp=2"), "-p", "Once upon", "--raw",
               "--max-new-tokens", "8", "--threads", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"] == whole.generate("Once upon", max_new_tokens=8).token_ids


# -- ranks that somebody else starts -----------------------------------------------------------------------------------

CODE = """
import sys, herdgraph.runtimes as r
with r.Engine.load(sys.argv[1], threads=1, timeout=20) as engine:
    print(type(engine._decoder.link).__name__, engine.generate("Once upon", max_new_tokens=8).token_ids, flush=True)
"""


def test_torchrun(directory: Path, whole: Engine, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CODE)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(script),
         str(directory / "tp=2,pp=2")], capture_output=True, text=True, check=False, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = whole.generate("Once upon", max_new_tokens=8).token_ids
    assert done.stdout.strip() == f"SharedMemory {wanted}"


def test_ranks_without_shared_memory_exchange_through_gloo(directory: Path, whole: Engine) -> None:
    done = run_ranks(4, "support.engine_worker", str(directory / "tp=2,pp=2"))
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = whole.generate("Once upon", max_new_tokens=8).token_ids
    assert done.stdout.strip() == f"Gloo {wanted}"
