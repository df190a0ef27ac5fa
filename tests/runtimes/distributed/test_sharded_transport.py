"""What ranks exchange, between real processes: shared memory and gloo give the same, and say who is missing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from herdgraph.runtimes.distributed.collectives import RankError
from herdgraph.runtimes.distributed.commands import (
    Command,
    Kind,
    Message,
    StepCommand,
    broadcast_message,
    receive_message,
)
from herdgraph.runtimes.distributed.shared_memory import SLOT, SharedMemory, create
from herdgraph.runtimes.executors.blocks import PlacedStep

WORKER = Path(__file__).parents[2] / "support" / "exchange_worker.py"
ANY_TIME = 60.0


def _start(transport: str, world: int, behaviour: str, timeout: float = 10.0) -> list[subprocess.Popen[str]]:
    """Processes that all exchange the same things; rank 0 prints what went wrong."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    descriptor = create(world)
    try:
        return [
            subprocess.Popen([sys.executable, str(WORKER), transport, str(descriptor), behaviour, str(timeout)],
                             pass_fds=[descriptor], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
                                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
            for rank in range(world)
        ]
    finally:
        os.close(descriptor)


def _ends(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    try:
        return [process.communicate(timeout=ANY_TIME) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("transport", ["memory", "gloo"])
@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_get_what_each_gave(transport: str, world: int) -> None:
    processes = _start(transport, world, "exchange")
    for process, (out, err) in zip(processes, _ends(processes), strict=True):
        assert (process.returncode, out.strip()) == (0, "done"), err[-2000:]


@pytest.mark.parametrize("transport", ["memory", "gloo"])
def test_a_killed_rank_is_noticed_by_all_others(transport: str) -> None:
    processes = _start(transport, 3, "forever")
    for process in processes:
        assert process.stdout
        assert process.stdout.readline().strip() == "going"
    processes[1].kill()
    killed = time.monotonic()
    (first, _), _, (last, _) = _ends(processes)
    assert time.monotonic() - killed < 5
    assert "rank 1" in first
    if transport == "memory":
        assert "rank 1" in last
        assert f"process {processes[1].pid}" in first


@pytest.mark.parametrize("transport", ["memory", "gloo"])
def test_a_stopped_rank_is_named_after_the_timeout(transport: str) -> None:
    processes = _start(transport, 3, "forever", timeout=2.0)
    for process in processes:
        assert process.stdout
        assert process.stdout.readline().strip() == "going"
    processes[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    first, _ = processes[0].communicate(timeout=ANY_TIME)
    assert 1.5 < time.monotonic() - stopped < 7
    assert "rank 1" in first
    assert "2 s" in first
    processes[1].kill()
    _ends(processes)


def test_a_chain_of_waiting_ranks_is_followed_to_its_end() -> None:
    descriptor = create(3)
    links = [SharedMemory(os.dup(descriptor), rank, 3, range(3), timeout=0.3) for rank in range(3)]
    os.close(descriptor)
    waiting = links[1]._cell(1, 3)
    links[1].words[waiting : waiting + 3] = array("q", [3, links[1]._cell(2, 2), 1])  # rank 1 for rank 2
    with pytest.raises(RankError, match=r"rank 2 \(process \d+\) has kept the others waiting for 0.3 s"):
        links[0].receive(np.zeros(1), 1)
    with pytest.raises(RankError, match="rank 2"):
        links[1].broadcast(np.zeros(1))  # told, though it would wait without limit


@pytest.mark.parametrize("steps", [(1, 1), (2, 1)], ids=["in the same step", "one step behind"])
def test_a_stopped_rank_of_the_next_stage_is_named_wherever_it_was(steps: tuple[int, int]) -> None:
    """Rank 3 is only its neighbor in the stage: the chain of those that wait ends there if both have begun a step."""
    descriptor = create(4)
    ranks = [SharedMemory(os.dup(descriptor), rank, 4, range(rank // 2 * 2, rank // 2 * 2 + 2)) for rank in range(4)]
    os.close(descriptor)
    ranks[0].mark(2)
    ranks[1].mark(3)
    for rank, count in zip(ranks[3:1:-1], steps, strict=True):
        for _ in range(count):
            rank.mark()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        ranks[0].expect(2, process.pid)
        said = {rank.blame().split(" has kept")[0] for rank in (ranks[0], ranks[1], ranks[3])}
        process.kill()
    assert said == {"rank 2"}


@pytest.fixture
def links() -> tuple[SharedMemory, SharedMemory]:
    descriptor = create(2)
    first, second = (SharedMemory(os.dup(descriptor), rank, 2, range(2)) for rank in range(2))
    os.close(descriptor)
    return first, second


def _told(links: tuple[SharedMemory, SharedMemory], message: Message) -> Message:
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(broadcast_message, links[0], message)
        heard = receive_message(links[1], 8)
        told.result()
    return heard


def test_a_rank_that_told_why_before_it_ended_is_quoted(
    links: tuple[SharedMemory, SharedMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells and ends between two looks at it: first whether it told anything, then whether it lives."""
    first, second = links

    def tells_and_ends(rank: int) -> bool:
        if rank == 1:
            second.fail("rank 1: out of memory")
        return rank != 1

    monkeypatch.setattr(first, "_lives", tells_and_ends)
    with pytest.raises(RankError, match=r"^rank 1: out of memory$"):
        first.check()


def test_commands_of_any_size(links: tuple[SharedMemory, SharedMemory]) -> None:
    random = np.random.default_rng(0)
    for count, tokens, rows, images in [(1, 1, 0, 0), (1, 512, 1, 5), (64, 1, 0, 0), (1, 12, 12, 0)]:
        sent = Command(Kind.PREFILL_CHUNK, list(range(count)), random.integers(0, 1 << 40, count).tolist(),
                       random.integers(0, 1 << 18, (count, tokens)).tolist(), list(range(rows)),
                       random.normal(size=(images, 8)).astype(np.float32))
        heard = Command.of(_told(links, sent.message()))
        assert (heard.kind, list(heard.keys), list(heard.lengths)) == (sent.kind, sent.keys, sent.lengths)
        assert (list(heard.ids_BT), list(heard.rows)) == (sent.ids_BT, sent.rows)
        np.testing.assert_array_equal(heard.features_PD, sent.features_PD)
    assert list(Command.of(_told(links, Command(Kind.FREE, [3, 4]).message())).keys) == [3, 4]


def test_steps_of_any_size(links: tuple[SharedMemory, SharedMemory]) -> None:
    random = np.random.default_rng(0)
    for tokens in ([1], [1, 1, 1], [300, 1, 7]):
        steps = [PlacedStep(random.integers(0, 1 << 18, count).tolist(), 70 * count, range(count // 2),
                            np.arange(count, dtype=np.int32), np.arange(count % 2, dtype=np.int32),
                            random.normal(size=(count // 3, 8)).astype(np.float32)) for count in tokens]
        copies = [(1, 2, 3)] * len(steps)
        heard = StepCommand.of(_told(links, StepCommand(steps, copies).message()))
        assert heard.copies == copies
        for found, step in zip(heard.steps, steps, strict=True):
            assert (found.token_ids, found.past, list(found.rows)) == (step.token_ids, step.past, list(step.rows))
            for name in ("whole", "chunked", "features"):
                np.testing.assert_array_equal(getattr(found, name), getattr(step, name))


def test_what_is_larger_than_a_slot_is_whole(tmp_path: Path) -> None:
    descriptor = create(1)
    link = SharedMemory(descriptor, 0, 1, range(1))
    value = np.arange(3 * SLOT // 4 + 5, dtype=np.float32)
    result = np.zeros_like(value)
    link.all_reduce(value, result)
    np.testing.assert_array_equal(result, value)
    assert link.spent.count == 1
