"""Replicas of an engine behind one address, on Ray Serve.

A replica is an actor of Ray Serve with an engine, its scheduler and its HTTP application; a sharded bundle's other
ranks are actors of their own beside it, in one placement group. Ray Serve sends a request to the less busy of two
replicas, checks their health, and starts a replica again that died, does not answer or whose engine was closed by a
failure; the others go on meanwhile.

The bundle's directory has to be there on every node. Without an address Ray runs on this machine, until the handle is
closed.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...errors import HerdError
from ...model.processing import Prompt
from ..bundle.manifest import Bundle
from ..engine import Engine
from ..generation import Generation
from ..scheduler import Service, ServiceOptions, drafter_of
from .calls import Calls
from .cluster_options import ClusterOptions, RankResources, load_ray
from .ranks import Ranks, require_room

APPLICATION = "herdgraph"
_OBJECT_STORE = 100 << 20
"""Bytes of Ray's store on this machine: prompts and texts are small."""
_MOST_ONGOING = 10_000
"""Requests that a replica may have: its own queue says when there are too many."""
_TRIES = 5


class EngineReplica:
    """One engine in an actor of Ray Serve.

    Args:
        bundle: directory.
        world: ranks of the bundle.
        options: how it runs.
        resources: of each rank.
        server: of the HTTP application, None without one.
    """

    def __init__(
        self, bundle: str, world: int, options: ClusterOptions, resources: RankResources, server: Any = None
    ) -> None:
        self._server_options = server
        self._ranks = Ranks(bundle, world, options, resources)
        engine = Engine.load(bundle, threads=options.threads, memory=options.memory, cache_bytes=options.cache_bytes,
                             timeout=options.timeout)
        drafter = drafter_of(options.speculate, engine, threads=options.threads)
        self._service = Service(engine, ServiceOptions(sequences=options.sequences), drafter=drafter)

    def __serve_build_asgi_app__(self) -> Any:
        """The HTTP application of this replica; Ray Serve asks for it."""
        from .app import create_app

        return create_app(self._service, replace(self._server_options, request_log=sys.stdout))

    async def generate(self, prompt: Prompt, options: dict[str, Any]) -> Generation:
        """See ``Service.generate``."""
        return await self._service.generate(prompt, **options)

    async def process(self) -> tuple[int, list[int]]:
        """Numbers of this process and of the other ranks'."""
        return os.getpid(), self._ranks.processes()

    def check_health(self) -> None:
        """Ray Serve asks; what is raised ends this replica, and another one is started."""
        if self._service.failure or not self._ranks.are_alive:
            raise RuntimeError(self._service.failure or "a rank has ended")

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.close()
        self._ranks.stop()


class Cluster:
    """Replicas of a bundle's engine; the handle is safe to use from several threads.

    Args:
        bundle: directory, the same on every node.
        options: what is started.
        server: ``ServerOptions`` of an HTTP application on every replica, None for calls of this handle only.
        host: interface of the address, with ``server``.
        port: of the address.

    Raises:
        HerdError: not a bundle, Ray is missing or not reachable, or a replica cannot be started.
    """

    def __init__(
        self, bundle: Path, options: ClusterOptions | None = None, *, server: Any = None, host: str = "127.0.0.1",
        port: int = 8000,
    ) -> None:
        self.options = options = options or ClusterOptions()
        manifest = Bundle.open(bundle, verify=False).manifest
        world = manifest.shards.plan.world if manifest.shards else 1
        resources = RankResources.of(manifest, options.threads)
        self._ray = load_ray()
        self._calls = Calls()
        self._connect(options.replicas * world * options.threads)
        try:
            require_room(self._ray, options, world, resources)
            http = {"location": "HeadOnly", "host": host, "port": port} if server else {"location": "NoServer"}
            self._ray.serve.start(http_options=http)
            replica = _deployment(self._ray.serve, options, [resources] * world, with_http=server is not None)
            bound = replica.bind(str(Path(bundle).resolve()), world, options, resources, server)
            self._handle = self._ray.serve.run(bound, name=APPLICATION, route_prefix="/" if server else None)
        except BaseException as error:
            self._leave()
            raise _for_people(error) from error

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

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Generate on one of the replicas; on another one when it dies meanwhile. Options as in ``Engine.generate``.

        Raises:
            HerdError: an impossible prompt or option, or no replica comes back.
            TypeError: there is no such option.
        """
        signature(Engine.generate).bind(self, prompt, **options)
        for _ in range(_TRIES):
            try:
                answer: Generation = self._calls.result(lambda: self._handle.generate.remote(prompt, options))
                return answer
            except self._ray.exceptions.RayActorError:
                continue
            except self._ray.exceptions.RayTaskError as error:
                raise _for_people(error) from error
        raise HerdError(f"{_TRIES} replicas that took the request died: see Ray's logs")

    def generate_all(self, prompts: Iterable[Prompt], **options: Any) -> list[Generation]:
        """Generate for several prompts, on all replicas at once; in the order of the prompts.

        An interruption does not wait for answers: closing the handle ends the replicas that are at work.
        """
        pool = ThreadPoolExecutor(self.options.replicas * self.options.sequences)
        try:
            return list(pool.map(lambda prompt: self.generate(prompt, **options), prompts))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def processes(self) -> tuple[int, list[int]]:
        """Numbers of the processes of one of the replicas, the first rank and the others."""
        found: tuple[int, list[int]] = self._calls.result(self._handle.process.remote)
        return found

    def close(self) -> None:
        """End all replicas, and Ray when it was started here; who still waits for an answer gets an error."""
        self._calls.end()
        self._leave()

    def _leave(self) -> None:
        if self.options.address:
            self._ray.serve.delete(APPLICATION)
        self._ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _deployment(serve: Any, options: ClusterOptions, ranks: list[RankResources], *, with_http: bool) -> Any:
    """What Ray Serve keeps running: replicas, each with a place for all of its ranks; itself it is the first."""
    return serve.deployment(serve.ingress()(EngineReplica) if with_http else EngineReplica).options(
        name="engine", num_replicas=options.replicas, max_ongoing_requests=_MOST_ONGOING,
        ray_actor_options=ranks[0].actor, placement_group_bundles=[rank.bundle for rank in ranks],
        placement_group_strategy="PACK", health_check_period_s=options.interval,
        health_check_timeout_s=options.health_timeout, graceful_shutdown_timeout_s=options.drain)


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
    if isinstance(error, (load_ray().exceptions.RayError, RuntimeError)):
        return HerdError(f"a replica failed: {str(error).strip().splitlines()[-1]}")
    return error
