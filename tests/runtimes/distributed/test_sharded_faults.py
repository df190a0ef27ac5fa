"""Ranks that fail, on real processes: one clear error soon, nothing left behind, and loading again serves."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.runtimes import Engine
from herdgraph.runtimes.distributed.process_state import alive
from herdgraph.runtimes.executors.runner import SCORES_BYTES, prefill_chunk_len
from support import herds

SOON = 5.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("faults")
    herds.save(HerdConfig(text=TINY.text), directory / "checkpoint")
    herds.write_processor(directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        for plan in ("tp=2", "pp=2"):
            build_bundle(checkpoint, directory / plan, shards=ShardPlan.parse(plan))
        build_bundle(checkpoint, directory / "stock", target="cpu-stock", shards=ShardPlan.parse("tp=2"))
    return directory


@pytest.fixture
def engine(directory: Path) -> Iterator[Engine]:
    with Engine.load(directory / "tp=2", threads=1, timeout=5.0) as engine:
        yield engine


def _worker(engine: Engine) -> int:
    [process] = engine._decoder.processes.started.values()
    return process.pid


def _fail_while_generating(engine: Engine, harm: Callable[[], None]) -> tuple[str, float]:
    """What a generation says that is harmed in the middle, and how long after."""
    stream = iter(engine.stream("Once upon", max_new_tokens=4000, stop_ids=[]))
    for _ in range(3):
        next(stream)
    harm()
    harmed = time.monotonic()
    with pytest.raises(HerdError) as raised:
        deque(stream, maxlen=0)
    return str(raised.value), time.monotonic() - harmed


def _serves(bundle: Path) -> None:
    with Engine.load(bundle, threads=1) as engine:
        assert len(engine.generate("Once upon", max_new_tokens=4, stop_ids=[]).token_ids) == 4


def _gone(*pids: int, within: float = SOON) -> None:
    until = time.monotonic() + within
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < until, f"processes {pids} are still there"
        time.sleep(0.05)


@pytest.mark.parametrize("plan", ["tp=2", "pp=2"])
def test_a_killed_rank(plan: str, directory: Path) -> None:
    engine = Engine.load(directory / plan, threads=1)
    worker = _worker(engine)
    message, seconds = _fail_while_generating(engine, lambda: os.kill(worker, signal.SIGKILL))
    assert seconds < SOON
    assert f"rank 1 (process {worker}) was killed by SIGKILL" in message
    assert not Path(f"/proc/{worker}").exists(), "it was waited for"
    with pytest.raises(HerdError, match=r"the engine was closed when it failed.*load the bundle again"):
        engine.decode(engine.new_sequence(), 5)
    _serves(directory / plan)


def test_a_rank_that_is_killed_between_calls(engine: Engine) -> None:
    sequence = engine.new_sequence()
    engine.prefill(sequence, herds.tokens(5))
    os.kill(_worker(engine), signal.SIGKILL)
    time.sleep(0.2)
    with pytest.raises(HerdError, match=r"rank 1 .* was killed by SIGKILL"):
        engine.decode(sequence, 5)


def test_a_stalled_rank_is_named_after_the_timeout(engine: Engine, directory: Path) -> None:
    worker = _worker(engine)
    message, seconds = _fail_while_generating(engine, lambda: os.kill(worker, signal.SIGSTOP))
    assert 4.5 < seconds < 5.0 + SOON
    assert f"rank 1 (process {worker}) has kept the others waiting for 5 s" in message
    assert not Path(f"/proc/{worker}").exists(), "a stopped process is ended, too"
    _serves(directory / "tp=2")


def test_idle_ranks_wait_longer_than_the_timeout(engine: Engine) -> None:
    time.sleep(5.5)
    assert len(engine.generate("Once", max_new_tokens=2, stop_ids=[]).token_ids) == 2


@pytest.fixture
def stock(directory: Path) -> Iterator[Engine]:
    """An engine whose sequences have buffers of their own, which forks copy."""
    with Engine.load(directory / "stock", threads=1, timeout=5.0) as engine:
        yield engine


def test_chunks_are_as_long_as_the_heads_of_a_rank_allow(stock: Engine) -> None:
    far = SCORES_BYTES // (4 * TINY.text.num_heads * 64)
    longer, shorter = prefill_chunk_len(TINY.text.num_heads // 2, far), prefill_chunk_len(TINY.text.num_heads, far)
    assert stock._decoder.chunk_len(far) == longer > shorter


def test_the_others_forget_sequences_that_are_gone(stock: Engine) -> None:
    runner = stock._decoder
    sequence = stock.new_sequence()
    stock.decode(sequence, 5)
    del sequence
    assert len(runner._freed) == 1
    stock.decode(stock.new_sequence(), 5)
    assert len(runner._freed) == 1, "the first was told, the second waits for the next command"


def test_a_rank_without_memory(stock: Engine) -> None:
    engine, worker = stock, _worker(stock)
    lines = Path(f"/proc/{worker}/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))
    sequence = engine.new_sequence()
    engine.prefill(sequence, herds.tokens(2100))  # half a megabyte of caches on each rank
    resource.prlimit(worker, resource.RLIMIT_AS, (used + (1 << 20), used + (1 << 20)))  # type: ignore[attr-defined]
    with pytest.raises(HerdError, match="rank 1: out of memory"):
        deque([sequence.fork() for _ in range(400)], maxlen=0)
    _gone(worker)


def test_an_interrupted_call_closes_the_engine(engine: Engine) -> None:
    worker = _worker(engine)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        engine.generate("Once upon", max_new_tokens=4000, stop_ids=[])
    _gone(worker)
    with pytest.raises(HerdError, match="closed when a call was interrupted: load the bundle again"):
        engine.generate("Once upon")


# -- the front end ---------------------------------------------------------------------------------------------------


def _front_end(bundle: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A command that generates for long, in a process group of its own as in a terminal, and its ranks."""
    process = subprocess.Popen(
        [sys.executable, "-m", "herdgraph", "generate", str(bundle), "-p", "Once upon", "--raw", "--threads", "1",
         "--max-new-tokens", "4000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdout
    process.stdout.read(1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, [int(pid) for pid in children]


def test_ctrl_c(directory: Path) -> None:
    process, ranks = _front_end(directory / "tp=2")
    assert ranks
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all of them
    _, error = process.communicate(timeout=SOON)
    assert process.returncode == 128 + signal.SIGINT
    assert error.decode().strip().splitlines()[-1] == "error: interrupted"
    _gone(*ranks)


def test_ranks_end_when_the_front_end_is_killed(directory: Path) -> None:
    process, ranks = _front_end(directory / "tp=2")
    assert ranks
    process.kill()
    process.communicate(timeout=SOON)
    _gone(*ranks)


# -- coming together -------------------------------------------------------------------------------------------------

CODE = """
import sys
from herdgraph.errors import HerdError
from herdgraph.runtimes import Engine
try:
    Engine.load(sys.argv[1], threads=1, timeout=float(sys.argv[2]))
except HerdError as error:
    print(error)
"""


def _joining(bundle: Path, rank: int, port: int, *, world: int = 2, timeout: float = 30) -> subprocess.Popen[str]:
    environment = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen([sys.executable, "-c", CODE, str(bundle), str(timeout)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | environment)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_rank_with_another_bundle(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(directory / "tp=2", other)
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"recipe": "fp32"', '"recipe": "fp32x"'))
    port = _free_port()
    ranks = [_joining(bundle, rank, port) for rank, bundle in enumerate((directory / "tp=2", other))]
    for rank in ranks:
        out, err = rank.communicate(timeout=60)
        assert f"rank 1: {other} is another bundle than rank 0 has" in out, err


def test_a_port_in_use(directory: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        out, err = _joining(directory / "tp=2", 0, port).communicate(timeout=60)
    assert out.strip() == f"port {port} of 127.0.0.1 is in use: set MASTER_PORT to another", err


def test_ranks_that_do_not_come_or_are_too_many(directory: Path) -> None:
    out, err = _joining(directory / "tp=2", 0, _free_port(), timeout=2).communicate(timeout=60)
    assert "rank 0 did not meet 1 others" in out, err
    out, err = _joining(directory / "tp=2", 0, _free_port(), world=3).communicate(timeout=60)
    assert "3 ranks were started, the bundle is split for 2" in out, err


def test_a_rank_that_cannot_start(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(HerdError, match=r"rank 1 \(process \d+\) ended with status 1"):
        Engine.load(directory / "tp=2", threads=1)
