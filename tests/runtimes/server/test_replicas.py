"""Replicas on a real Ray of this machine: shared work, a killed replica, a sharded one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.interruption import Interrupted, signals_unwind
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.runtimes import Engine
from herdgraph.runtimes.server.cluster_options import ClusterOptions
from herdgraph.runtimes.server.replicas import Cluster

PROMPT = "Once upon a time"
OPTIONS = {"max_new_tokens": 8, "stop_ids": []}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support import herds  # with transformers, which the process of its own below does not need

    directory = tmp_path_factory.mktemp("cluster")
    herds.save(HerdConfig(text=TINY.text), directory / "checkpoint")
    herds.write_processor(directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        build_bundle(checkpoint, directory / "whole")
        build_bundle(checkpoint, directory / "tp=2", shards=ShardPlan(tensor=2))
    return directory


@pytest.fixture(scope="module")
def wanted(directory: Path) -> list[int]:
    return Engine.load(directory / "whole", threads=1).generate(PROMPT, **OPTIONS).token_ids


@pytest.fixture(scope="module")
def cluster(directory: Path) -> Iterator[Cluster]:
    with Cluster(directory / "whole", ClusterOptions(2, interval=0.2)) as cluster:
        yield cluster


def _until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def _processes(cluster: Cluster) -> set[int]:
    """Of the replicas, by asking many times at once."""
    with ThreadPoolExecutor(16) as pool:
        return {first for first, _ in pool.map(lambda _: cluster.processes(), range(32))}


def test_requests_are_shared(cluster: Cluster, wanted: list[int]) -> None:
    found = cluster.generate_all([PROMPT] * 6, **OPTIONS)
    assert [one.token_ids for one in found] == [wanted] * 6
    assert len(_processes(cluster)) == 2


def test_an_interruption_does_not_wait_for_answers(cluster: Cluster) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted), signals_unwind():
        cluster.generate_all([PROMPT] * 4, max_new_tokens=2000, stop_ids=[])


def test_a_wrong_request_is_told_and_harms_nobody(cluster: Cluster, wanted: list[int]) -> None:
    with pytest.raises(HerdError, match="temperature is -1"):
        cluster.generate(PROMPT, temperature=-1)
    assert cluster.generate(PROMPT, **OPTIONS).token_ids == wanted


def test_a_killed_replica_is_started_again_and_the_other_goes_on(cluster: Cluster, wanted: list[int]) -> None:
    """Both have requests when one is killed: all are answered, on the other one or on the new one."""
    before = _processes(cluster)
    victim = min(before)
    answers: list[list[int]] = []
    requests = [threading.Thread(target=lambda: answers.append(
        cluster.generate(PROMPT, max_new_tokens=1500, stop_ids=[]).token_ids)) for _ in range(6)]
    for request in requests:
        request.start()
    time.sleep(1.0)
    os.kill(victim, signal.SIGKILL)
    assert cluster.generate(PROMPT, **OPTIONS).token_ids == wanted, "the other one goes on"
    for request in requests:
        request.join(240)
    assert [len(answer) for answer in answers] == [1500] * 6
    assert all(answer[: len(wanted)] == wanted for answer in answers)
    _until(lambda: len(now := _processes(cluster)) == 2 and victim not in now)
    assert before - {victim} < _processes(cluster)


@pytest.mark.slow  # a second Ray
def test_the_command(directory: Path, wanted: list[int]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "herdgraph", "run", str(directory / "whole"), PROMPT, PROMPT, "--replicas", "2", "--raw",
         "--max-new-tokens", "8", "--json"], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [one["token_ids"][: len(wanted)] for one in json.loads(done.stdout)] == [wanted] * 2


def test_who_still_waits_at_the_end_is_told(cluster: Cluster) -> None:
    """Ray would end this process otherwise, in the thread that waits."""
    with ThreadPoolExecutor(4) as pool:
        requests = [pool.submit(cluster.generate, PROMPT, max_new_tokens=3000, stop_ids=[]) for _ in range(4)]
        time.sleep(0.5)
        cluster.close()
        assert [type(request.exception()) for request in requests] == [HerdError] * 4
    with pytest.raises(HerdError, match="the cluster was closed"):
        cluster.generate(PROMPT, **OPTIONS)


@pytest.mark.slow  # a second Ray
def test_a_sharded_replica_comes_back_when_a_rank_dies(directory: Path, wanted: list[int]) -> None:
    """In a process of its own: Ray forks to start, which a process that has had one does not always survive."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(_answers_around_the_death_of_a_rank, directory).result(240) == [wanted] * 2


def _answers_around_the_death_of_a_rank(directory: Path) -> list[list[int]]:
    with Cluster(directory / "tp=2", ClusterOptions(1, interval=0.2)) as sharded:
        before = sharded.generate(PROMPT, **OPTIONS).token_ids
        first, [other] = sharded.processes()
        os.kill(other, signal.SIGKILL)
        _until(lambda: sharded.processes()[0] != first)
        return [before, sharded.generate(PROMPT, **OPTIONS).token_ids]


def test_what_cannot_be_started(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(HerdError, match="0 replicas of 1 threads"):
        Cluster(directory / "whole", ClusterOptions(0))
    with pytest.raises(HerdError, match="does not exist"):
        Cluster(tmp_path / "none")
    with pytest.raises(HerdError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        Cluster(directory / "whole", ClusterOptions(address="127.0.0.1:1"))
