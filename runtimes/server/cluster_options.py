"""How replicas are started on a Ray cluster."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ...errors import HerdError
from ..bundle.manifest import Manifest
from ..distributed.collectives import TIMEOUT
from ..executors.options import Memory

CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class RankResources:
    """What Ray sets aside for one rank.

    Attributes:
        cpus: processors.
        gpus: GPUs; Ray shows a process only its own, as device 0.
    """

    cpus: int
    gpus: int = 0

    @classmethod
    def of(cls, manifest: Manifest, threads: int) -> RankResources:
        """One GPU for each rank of a bundle that runs on GPUs."""
        on_gpus = manifest.executor == "tensorrt" or manifest.provider == CUDA
        return cls(threads, int(on_gpus))

    @property
    def bundle(self) -> dict[str, int]:
        """Of a placement group."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    @property
    def actor(self) -> dict[str, int]:
        """Options of an actor that takes such a bundle."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


@dataclass(frozen=True)
class ClusterOptions:
    """What is started.

    Attributes:
        replicas: engines.
        address: of a running Ray cluster; None starts Ray on this machine.
        threads: threads of one operator, and CPUs that Ray sets aside, per rank.
        memory: as for ``Engine.load``.
        cache_bytes: as for ``Engine.load``.
        sequences: answers that a replica generates at the same time.
        speculate: how next tokens are guessed; see ``drafter_of``.
        timeout: seconds that a rank may keep the others waiting in the middle of a call.
        interval: seconds between two health checks.
        health_timeout: seconds until a replica that does not answer a health check counts as lost.
        drain: seconds that running requests get when a replica is stopped.
    """

    replicas: int = 1
    address: str | None = None
    threads: int = 1
    memory: Memory = "fast"
    cache_bytes: int | None = None
    sequences: int = 64
    speculate: str = "lookup"
    timeout: float = TIMEOUT
    interval: float = 1.0
    health_timeout: float = 30.0
    drain: float = 30.0

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.threads < 1:
            raise HerdError(f"{self.replicas} replicas of {self.threads} threads were asked for, at least 1 of each is "
                            "needed")


def load_ray() -> Any:
    """The ray module, with what Ray Serve needs.

    Raises:
        HerdError: it is not installed.
    """
    try:
        import_module("ray.serve")
    except ImportError as error:
        raise HerdError("Ray Serve is not installed: pip install 'herdgraph[cluster]'") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it reports every start and every retry to the terminal
    return import_module("ray")
