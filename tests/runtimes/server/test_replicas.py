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
from herdgraph.runtimes.server.replicas import Cluster, ClusterOptions
from support import herds

PROMPT = "Once upon a time"
OPTIONS = {"max_new_tokens": 8, "stop_ids": []}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def test_requests_go_to_the_least_busy_replica(cluster: Cluster, wanted: list[int]) -> None:
    found = cluster.generate_all([PROMPT] * 6, **OPTIONS)
    assert [one.token_ids for one in found] == [wanted] * 6
    first, second = cluster.replicas
    first.busy += 1
    assert cluster._taken() is second
    first.busy, second.busy = 0, 0


def test_an_interruption_does_not_wait_for_answers(cluster: Cluster) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted), signals_unwind():
        cluster.generate_all([PROMPT] * 4, max_new_tokens=2000, stop_ids=[])
    assert any(replica.busy for replica in cluster.replicas)
    _until(lambda: not any(replica.busy for replica in cluster.replicas))


def test_a_wrong_request_is_told_and_harms_nobody(cluster: Cluster, wanted: list[int]) -> None:
    with pytest.raises(HerdError, match="temperature is -1"):
        cluster.generate(PROMPT, temperature=-1)
    assert all(replica.ready for replica in cluster.replicas)
    assert cluster.generate(PROMPT, **OPTIONS).token_ids == wanted


def test_a_killed_replica_is_started_again_and_the_other_goes_on(cluster: Cluster, wanted: list[int]) -> None:
    victim, other = cluster.replicas
    killed, going = victim.process, other.process
    answers: list[int] = []
    request = threading.Thread(
        target=lambda: answers.extend(cluster.generate(PROMPT, max_new_tokens=3000, stop_ids=[]).token_ids))
    request.start()
    _until(lambda: victim.busy == 1)
    time.sleep(0.3)
    os.kill(killed, signal.SIGKILL)
    assert cluster.generate(PROMPT, **OPTIONS).token_ids == wanted, "the other one goes on"
    request.join(240)
    assert answers[: len(wanted)] == wanted
    assert len(answers) == 3000, "the request went to another replica"
    _until(lambda: victim.ready and victim.process != killed)
    assert other.process == going
    assert [one.token_ids for one in cluster.generate_all([PROMPT] * 4, **OPTIONS)] == [wanted] * 4


def test_the_command(directory: Path, wanted: list[int]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "herdgraph", "run", str(directory / "whole"), PROMPT, PROMPT, "--replicas", "2", "--raw",
         "--max-new-tokens", "8", "--json"], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [one["token_ids"][: len(wanted)] for one in json.loads(done.stdout)] == [wanted] * 2


def test_a_sharded_replica_comes_back_when_a_rank_dies(directory: Path, wanted: list[int], cluster: Cluster) -> None:
    cluster.close()  # one Ray at a time
    with Cluster(directory / "tp=2", ClusterOptions(1, interval=0.2)) as sharded:
        assert sharded.generate(PROMPT, **OPTIONS).token_ids == wanted
        [replica] = sharded.replicas
        first = replica.process
        sharded._ray.kill(replica._actors[1])
        _until(lambda: replica.ready and replica.process != first)
        assert sharded.generate(PROMPT, **OPTIONS).token_ids == wanted


def test_what_cannot_be_started(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(HerdError, match="0 replicas of 1 threads"):
        Cluster(directory / "whole", ClusterOptions(0))
    with pytest.raises(HerdError, match="does not exist"):
        Cluster(tmp_path / "none")
    with pytest.raises(HerdError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        Cluster(directory / "whole", ClusterOptions(address="127.0.0.1:1"))
