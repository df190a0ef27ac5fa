"""Replicas of an engine on a Ray cluster, behind one handle that sends each request to the least busy one.

A replica is one actor per rank of the bundle, placed together; a whole bundle has one rank. Rank 0's actor holds the
engine, the others serve it. A watcher checks their health: a replica that lost an actor, does not answer or whose
engine was closed by a failure is stopped and started again, while the others go on. A request whose replica dies is
sent to another one.

The bundle's directory has to be there on every node. Without an address Ray runs on this machine, until the handle is
closed.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...errors import HerdError
from ...model.processing import Prompt
from ..bundle.manifest import Bundle
from ..distributed.collectives import TIMEOUT
from ..engine import Engine
from ..executors.options import Memory
from ..generation import Generation

_OBJECT_STORE = 100 << 20
"""Bytes of Ray's store on this machine: prompts and texts are small."""


@dataclass(frozen=True)
class ClusterOptions:
    """What is started.

    Attributes:
        replicas: engines.
        address: of a running Ray cluster; None starts Ray on this machine.
        threads: threads of one operator, and CPUs that Ray sets aside, per rank.
        memory: as for ``Engine.load``.
        timeout: seconds that a rank may keep the others waiting in the middle of a call.
        health_timeout: seconds until a replica that does not answer a health check counts as lost.
        interval: seconds between two health checks.
        start: seconds that a replica may take to load.
    """

    replicas: int = 1
    address: str | None = None
    threads: int = 1
    memory: Memory = "fast"
    timeout: float = TIMEOUT
    health_timeout: float = 30.0
    interval: float = 1.0
    start: float = 1800.0


def load_ray() -> Any:
    """The ray module.

    Raises:
        HerdError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise HerdError("ray is not installed: pip install 'herdgraph[cluster]'") from error
    return ray


class RankActor:
    """One rank in a process of the cluster."""

    def __init__(self) -> None:
        self._engine: Engine | None = None

    def address(self) -> tuple[str, int]:
        """Where ranks can meet this one: a port that is free now."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return load_ray().util.get_node_ip_address(), listener.getsockname()[1]

    def load(self, bundle: str, rank: int, world: int, address: tuple[str, int], options: ClusterOptions) -> int:
        """Load the engine on rank 0; the other ranks serve it and come back when it ends.

        Returns:
            This process.
        """
        if world > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": address[0],
                           "MASTER_PORT": str(address[1])}
        self._engine = Engine.load(bundle, threads=options.threads, memory=options.memory, timeout=options.timeout)
        return os.getpid()

    def generate(self, prompt: Prompt, options: dict[str, Any]) -> Generation:
        """See ``Engine.generate``."""
        assert self._engine is not None, "requests come after loading"
        return self._engine.generate(prompt, **options)

    def is_healthy(self) -> bool:
        """Whether the engine still serves."""
        return self._engine is not None and not self._engine.closed


class Replica:
    """One engine: its actors, and how many requests it has.

    Args:
        bundle: directory.
        world: ranks of the bundle.
        options: how they are started.

    Attributes:
        busy: requests on their way.
        ready: whether it takes requests.
        process: of rank 0.
    """

    def __init__(self, bundle: Path, world: int, options: ClusterOptions) -> None:
        self._ray, self._bundle, self._world, self._options = load_ray(), bundle, world, options
        self.busy, self.ready, self.process = 0, False, 0
        self._actors: list[Any] = []
        self._serving: list[Any] = []
        self._group: Any = None

    def start(self) -> None:
        """Place the actors and load.

        Raises:
            HerdError: there is no room in the cluster, or the bundle cannot be loaded.
        """
        ray, options = self._ray, self._options
        placement = ray.util.placement_group([{"CPU": options.threads}] * self._world, strategy="PACK")
        self._group = placement
        if not placement.wait(options.health_timeout):
            raise HerdError(f"the cluster has no {self._world} x {options.threads} CPUs left for a replica: start "
                            "fewer replicas, or give it more nodes")
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        actor = ray.remote(concurrency_groups={"health": 1})(RankActor)
        self._actors = [
            actor.options(num_cpus=options.threads,
                          scheduling_strategy=strategy(placement, placement_group_bundle_index=rank)).remote()
            for rank in range(self._world)
        ]
        address = ray.get(self._actors[0].address.remote(), timeout=options.start)
        first, *self._serving = [
            actor.load.remote(str(self._bundle), rank, self._world, address, options)
            for rank, actor in enumerate(self._actors)
        ]
        self.process = ray.get(first, timeout=options.start)
        self.ready = True

    def generate(self, prompt: Prompt, options: dict[str, Any]) -> Generation:
        """See ``Engine.generate``."""
        return self._ray.get(self._actors[0].generate.remote(prompt, options))

    def is_healthy(self) -> bool:
        """Whether rank 0 answers, its engine is open, and no other rank has ended."""
        if self._serving and self._ray.wait(self._serving, timeout=0)[0]:
            return False
        answer = self._actors[0].is_healthy.options(concurrency_group="health").remote()
        try:
            return bool(self._ray.get(answer, timeout=self._options.health_timeout))
        except self._ray.exceptions.RayError:
            return False

    def stop(self) -> None:
        """End the actors and give back their room."""
        self.ready = False
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors, self._serving = [], []
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
            self._group = None


class Cluster:
    """Replicas of a bundle's engine; the handle is safe to use from several threads.

    Args:
        bundle: directory, the same on every node.
        options: what is started.

    Raises:
        HerdError: not a bundle, Ray is missing or not reachable, or a replica cannot be started.
    """

    def __init__(self, bundle: Path, options: ClusterOptions | None = None) -> None:
        self.options = options = options or ClusterOptions()
        if options.replicas < 1 or options.threads < 1:
            raise HerdError(f"{options.replicas} replicas of {options.threads} threads were asked for, at least 1 of "
                            "each is needed")
        shards = Bundle.open(bundle, verify=False).manifest.shards
        world = shards.plan.world if shards else 1
        self._ray = load_ray()
        self._connect(options.replicas * world * options.threads)
        self.replicas = [Replica(Path(bundle).resolve(), world, options) for _ in range(options.replicas)]
        self._changed, self._closing = threading.Condition(), threading.Event()
        try:
            with ThreadPoolExecutor(len(self.replicas)) as pool:
                list(pool.map(Replica.start, self.replicas))
        except BaseException as error:
            self._leave()
            raise _for_people(error) from error
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="herdgraph-replicas")
        self._watcher.start()

    def _connect(self, cpus: int) -> None:
        """Join the cluster, or start one of this machine for as many ranks as are wanted."""
        address = self.options.address
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local = {} if address else {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _OBJECT_STORE}
        try:
            _probe(address)
            self._ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **local)
        except Exception as error:  # Ray raises plain ones, too, such as when its start takes too long
            where, text = address or "this machine", str(error).splitlines()[0]
            raise HerdError(f"no Ray cluster answers at {where}: {text}") from error

    # -- requests ------------------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Generate on the least busy replica; on another one when it dies meanwhile. Options as in ``Engine.generate``.

        Raises:
            HerdError: an impossible prompt or option, or no replica comes back.
            TypeError: there is no such option.
        """
        signature(Engine.generate).bind(self, prompt, **options)
        for _ in range(2 * len(self.replicas) + 1):
            replica = self._taken()
            try:
                return replica.generate(prompt, options)
            except self._ray.exceptions.RayActorError:
                replica.ready = False
            except self._ray.exceptions.RayTaskError as error:
                if replica.is_healthy():  # the request was at fault
                    raise _for_people(error) from error
                replica.ready = False
            finally:
                self._give_back(replica)
        raise HerdError("every replica that took the request died: see Ray's logs")

    def generate_all(self, prompts: Iterable[Prompt], **options: Any) -> list[Generation]:
        """Generate for several prompts, on all replicas at once; in the order of the prompts.

        An interruption does not wait for answers: closing the handle ends the replicas that are at work.
        """
        pool = ThreadPoolExecutor(len(self.replicas))
        try:
            return list(pool.map(lambda prompt: self.generate(prompt, **options), prompts))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _taken(self) -> Replica:
        """The least busy replica that is ready; waits for one to come back."""
        with self._changed:
            if not self._changed.wait_for(self._is_answerable, self.options.start):
                raise HerdError(f"no replica came back within {self.options.start:g} s")
            if self._closing.is_set():
                raise HerdError("the replicas were closed: start them again")
            replica = min((replica for replica in self.replicas if replica.ready), key=lambda replica: replica.busy)
            replica.busy += 1
            return replica

    def _is_answerable(self) -> bool:
        """Whether a request can be sent, or never will be."""
        return self._closing.is_set() or any(replica.ready for replica in self.replicas)

    def _give_back(self, replica: Replica) -> None:
        with self._changed:
            replica.busy -= 1

    # -- replicas ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Restart replicas that are not healthy, until the handle is closed."""
        while not self._closing.wait(self.options.interval):
            for replica in self.replicas:
                if not (replica.ready and replica.is_healthy()) and not self._closing.is_set():
                    self._restart(replica)

    def _restart(self, replica: Replica) -> None:
        replica.stop()
        try:
            replica.start()
        except (HerdError, self._ray.exceptions.RayError):
            return  # the next health check tries again
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """End all replicas, and Ray when it was started here."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        self._watcher.join()
        self._leave()

    def _leave(self) -> None:
        for replica in self.replicas:
            replica.stop()
        self._ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _probe(address: str | None) -> None:
    """Connect once to a Ray address, to fail within seconds: Ray itself would retry for many minutes."""
    if address and ":" in address:
        place = urlsplit(address if "//" in address else f"//{address}")
        socket.create_connection((place.hostname or "localhost", place.port or 6379), timeout=10).close()


def _for_people(error: BaseException) -> BaseException:
    """The error that an actor raised, not Ray's account of it."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, HerdError):
        return HerdError(str(cause))
    if isinstance(error, load_ray().exceptions.RayError):
        return HerdError(f"a replica failed: {str(error).strip().splitlines()[-1]}")
    return error
