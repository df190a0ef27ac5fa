"""Exchanges through NCCL between real processes, on a hollow NCCL: sums of numpy, and one error when a rank fails.

The real one was not seen: there is no GPU here. What is shown is that the calls are the right ones, in an order that
ends, and that whoever is missing is named in time.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herdgraph.errors import HerdError
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.runtimes.distributed import libnccl
from herdgraph.runtimes.distributed.collectives import RankError
from herdgraph.runtimes.distributed.nccl import Nccl
from herdgraph.runtimes.distributed.shared_memory import SharedMemory, create
from herdgraph.runtimes.executors.device_array import DeviceArray
from support import hollow_nccl

WORKER = Path(hollow_nccl.__file__).with_name("nccl_worker.py")
ANY_TIME = 60.0
SOON = 5.0
"""Seconds until ranks whose timeout is one have seen that another fails."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hollow_nccl.compiled(tmp_path_factory.mktemp("nccl"))


def _start(
    library: Path, plan: str, behaviour: str, *, timeout: float = 10.0, fault: str = "", version: str = "",
    gloo: bool = False,
) -> list[subprocess.Popen[str]]:
    """Ranks that all do the same, but rank 1 with a fault or another version."""
    world = ShardPlan.parse(plan).world
    descriptor = create(world)
    arguments = ["-" if gloo else str(descriptor), plan, behaviour, str(timeout)]
    try:
        return [
            subprocess.Popen(
                [sys.executable, str(WORKER), *arguments], pass_fds=[descriptor],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=os.environ | {"RANK": str(rank), "OMP_NUM_THREADS": "1"} | hollow_nccl.environment(
                    library, fault if rank == 1 else "", version if rank == 1 else ""))
            for rank in range(world)
        ]
    finally:
        os.close(descriptor)


def _ends(processes: list[subprocess.Popen[str]]) -> list[list[str]]:
    """What each said, line by line."""
    try:
        ended = [process.communicate(timeout=ANY_TIME) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any("Traceback" in err for _, err in ended), ended
    return [out.splitlines() for out, _ in ended]


@pytest.mark.parametrize(("plan", "counts"), [("tp=2", [32, 32]), ("tp=2,pp=2", [33, 33, 33, 33])])
def test_all_ranks_get_what_numpy_says(library: Path, plan: str, counts: list[int]) -> None:
    found = _ends(_start(library, plan, "exchange"))
    assert found == [["met", str(count)] for count in counts]
    assert [path.name for path in library.parent.iterdir()] == [library.name]


@pytest.mark.parametrize(("fault", "words"), [
    ("", "33"), ("9:kill", "rank 1 has kept the others waiting for 1 s"),
])
def test_ranks_on_several_machines_meet_through_gloo(
    library: Path, fault: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed rank is missed when names are called: gloo does not see it while nothing is exchanged through it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
    ranks = _start(library, "tp=1,pp=2", "forever" if fault else "exchange", timeout=1.0, fault=fault, gloo=True)
    assert re.search(words, _ends(ranks)[0][-1])


@pytest.mark.parametrize(("plan", "fault", "words"), [
    ("tp=2", "9:kill", r"rank 1 \(process \d+\) has ended"),
    ("tp=2,pp=2", "9:kill", r"rank 1 \(process \d+\) has ended"),
    ("tp=2", "0:kill", r"rank 1 \(process \d+\) has ended"),
    ("tp=2", "9:stall", r"rank \d has waited for 1 s in an exchange that all have begun"),
    ("tp=2", "0:stall", r"rank \d has waited for 1 s"),
    ("tp=2", "9:count", r"rank \d has waited for 1 s"),
    ("tp=2", "9:error", "rank 1: ncclAllReduce failed: unhandled cuda error; hollow"),
    ("tp=2", "9:lost", r"rank \d has lost another rank: remote process exited or there was a network error"),
])
def test_a_rank_that_fails_is_told_by_the_others(library: Path, plan: str, fault: str, words: str) -> None:
    first, *others = _ends(_start(library, plan, "forever", timeout=1.0, fault=fault))
    told = (first, *(other for other in others if "kill" not in fault))
    assert all(re.search(words, lines[-1]) for lines in told), (first, others)
    assert all(float(lines[1]) < SOON for lines in told if lines[0] == "met")


@pytest.mark.parametrize("plan", ["tp=4", "tp=2,pp=2"])
def test_a_stopped_rank_is_named(library: Path, plan: str) -> None:
    """It is behind the others of its stage, which have begun the next exchange."""
    processes = _start(library, plan, "forever", timeout=1.0)
    for process in processes:
        assert process.stdout
        assert process.stdout.readline().strip() == "met"
    processes[2].send_signal(signal.SIGSTOP)
    assert processes[0].stdout
    assert float(processes[0].stdout.readline()) < SOON
    assert re.match("rank 2 has kept the others waiting for 1 s", processes[0].stdout.readline())
    processes[2].kill()
    _ends(processes)


def test_versions_that_differ_or_are_too_old(library: Path) -> None:
    first, second = _ends(_start(library, "tp=2", "exchange", version="22005"))
    assert first == second == ["rank 1 has NCCL 2.20.5, rank 0 has 2.32.3: install the same on every machine"]
    first, second = _ends(_start(library, "tp=2", "exchange", version="21210"))
    assert second == ["NCCL 2.12.10 is too old, at least 2.13.0 is needed: pip install -U nvidia-nccl-cu13"]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(libnccl, "_path", lambda: "libnccl.so.2.none")
    with pytest.raises(HerdError, match=r"exchange through NCCL, and libnccl.so.2 is not found: pip install nvidia-nc"):
        libnccl.load()
    monkeypatch.setattr(libnccl, "_path", lambda: "libc.so.6")
    with pytest.raises(HerdError, match=r"libc\.so\.6 is not the NCCL that is needed: .*ncclGetVersion"):
        libnccl.load()


# -- one rank in this process ------------------------------------------------------------------------------------------


class Stream:
    """A stream that is done when it is told."""

    handle, done = 7, True

    def activate(self) -> None:
        """There is nothing to make current."""

    def is_done(self) -> bool:
        return self.done


@pytest.fixture
def alone(library: Path, monkeypatch: pytest.MonkeyPatch) -> Nccl:
    """The only rank, whose stream may be stuck."""
    monkeypatch.setattr(libnccl, "_path", lambda: str(library))
    monkeypatch.setenv("HOLLOW_NCCL_DIR", str(library.parent))
    host = SharedMemory(create(1), 0, 1, range(1), timeout=0.3)
    return Nccl(host, ShardPlan(), Stream())


def test_a_stream_that_is_stuck_is_aborted(alone: Nccl) -> None:
    """Kernels wait on the GPU, not in a call: the host waits for the stream, and no longer than the timeout."""
    value = np.ones(5, np.float32)
    array = DeviceArray(value.ctypes.data, value.shape, "float32")
    alone.stream.done = False  # type: ignore[attr-defined]
    alone.all_reduce(array, array)
    with pytest.raises(RankError, match=r"rank 0 has waited for 0\.3 s in an exchange that all"):
        alone.watch.wait()
    with pytest.raises(RankError, match=r"0\.3 s"):
        alone.all_reduce(array, array)


def test_idle_ranks_are_not_watched(alone: Nccl) -> None:
    alone.watch.wait()
    time.sleep(0.5)
    alone.watch.wait()
    alone.close()


def test_tensorrt_is_given_the_pointer(alone: Nccl) -> None:
    read: Any = ctypes.pythonapi.PyCapsule_GetPointer
    read.argtypes, read.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    assert read(alone.capsule(), None) == alone._stage._pointer.value
    alone.close()
