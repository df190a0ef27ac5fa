"""The ranks of a sharded engine as processes of a Ray cluster, placed together with the first one."""

from __future__ import annotations

import os
import socket
from typing import Any

from ...errors import HerdError
from ..engine import Engine
from .cluster_options import ClusterOptions, RankResources, load_ray


class RankActor:
    """One rank but the first, in a process of the cluster."""

    def process(self) -> int:
        """Its number on its machine."""
        return os.getpid()

    def serve(self, bundle: str, rank: int, world: int, address: tuple[str, int], options: ClusterOptions) -> None:
        """Serve rank 0 until its engine is closed; loading a bundle as another rank does not return before."""
        join_as(rank, world, address)
        Engine.load(bundle, threads=options.threads, memory=options.memory, timeout=options.timeout)


class Ranks:
    """All ranks but the first, which is the process that calls this.

    Args:
        bundle: directory, the same on every node.
        world: ranks of the bundle.
        options: how they run.
        resources: of each.
    """

    def __init__(self, bundle: str, world: int, options: ClusterOptions, resources: RankResources) -> None:
        self._ray = load_ray()
        self._actors: list[Any] = []
        self._started: list[Any] = []
        self._serving: list[Any] = []
        if world == 1:
            return
        address = (self._ray.util.get_node_ip_address(), _free_port())
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        group = self._ray.util.get_current_placement_group()
        for rank in range(1, world):
            place = strategy(group, placement_group_bundle_index=rank)
            actor = self._ray.remote(RankActor).options(**resources.actor, scheduling_strategy=place).remote()
            self._actors.append(actor)
            self._started.append(actor.process.remote())
            self._serving.append(actor.serve.remote(bundle, rank, world, address, options))
        join_as(0, world, address)

    @property
    def are_alive(self) -> bool:
        """Whether none has ended."""
        return not (self._serving and self._ray.wait(self._serving, timeout=0)[0])

    def processes(self) -> list[int]:
        """Their numbers on their machines."""
        return list(self._ray.get(self._started))

    def stop(self) -> None:
        """End them."""
        for actor in self._actors:
            self._ray.kill(actor)


def join_as(rank: int, world: int, address: tuple[str, int]) -> None:
    """Let the next engine of this process be one rank of several, as torchrun would."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": address[0],
                   "MASTER_PORT": str(address[1])}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def require_room(ray: Any, options: ClusterOptions, world: int, resources: RankResources) -> None:
    """Refuse more replicas than the cluster has processors or GPUs for; Ray would wait for more nodes for ever.

    Raises:
        HerdError: with both numbers.
    """
    for kind, each in resources.bundle.items():
        there, wanted = int(ray.cluster_resources().get(kind, 0)), options.replicas * world * each
        if wanted > there:
            raise HerdError(f"{options.replicas} replicas of {world} x {each} {kind}s need {wanted}, the cluster has "
                            f"{there}: start fewer replicas, or give it more nodes")
