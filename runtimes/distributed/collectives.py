"""What ranks exchange: sums, joined rows, hidden states, commands. The seam between a shard and its transport.

Two transports stand behind it: ``SharedMemory`` (shared_memory.py) where all ranks run on one machine, ``Gloo``
(gloo.py) where they do not. Ranks on GPUs put ``Nccl`` (nccl.py) around one of them. Every sum is taken in the order of
the ranks, or taken once and handed out: all ranks of a stage see the same bits, so that their copies of a router choose
the same experts.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import HerdError

Array = np.ndarray[Any, Any]
Values = Any
"""What is exchanged, C-contiguous: an ``Array`` in the host's memory, for NCCL a ``DeviceArray``."""

TIMEOUT = 60.0
"""Seconds that a rank may keep the others waiting in the middle of a call."""


class RankError(HerdError):
    """Another rank failed, ended or stalls; the message names it."""


@dataclass
class Spent:
    """What exchanges cost a rank: their number and the seconds in them, waiting for slower ranks included."""

    count: int = 0
    seconds: float = 0.0


class Collectives(ABC):
    """This rank's exchanges with the others. Values stay where they are.

    Args:
        rank: index of this process.
        world: number of processes.
        group: the ranks of this one's stage, in order.
        timeout: seconds that a rank may keep the others waiting in the middle of a call.

    Attributes:
        spent: count and seconds of all exchanges but commands.
    """

    def __init__(self, rank: int, world: int, group: range, timeout: float) -> None:
        self.rank, self.world, self.group, self.timeout = rank, world, group, timeout
        self.spent = Spent()

    @abstractmethod
    def all_reduce(self, value: Values, result: Values) -> None:
        """Sum of every rank's ``value`` over the stage; ``result`` has the same shape and may be the same array."""

    @abstractmethod
    def all_gather(self, value: Values, result: Values) -> None:
        """Every rank's ``value`` [..., n] side by side along the last axis: ``result`` [..., width · n]."""

    @abstractmethod
    def send(self, value: Values, target: int) -> None:
        """Hand an array to another rank."""

    @abstractmethod
    def receive(self, result: Values, source: int) -> None:
        """Take what ``source`` sends."""

    @abstractmethod
    def broadcast(self, value: Array) -> None:
        """Rank 0's array to every rank. The others wait without limit, as long as rank 0 is there."""

    @abstractmethod
    def barrier(self) -> None:
        """Go on when every rank has come here, however long the others take to load."""

    @abstractmethod
    def fail(self, message: str) -> None:
        """Let the other ranks know why this one ends."""

    @abstractmethod
    def check(self) -> None:
        """See whether the others are there, without waiting.

        Raises:
            RankError: another rank is known to have failed or ended.
        """

    @abstractmethod
    def mark(self, peer: int | None = None) -> None:
        """Count a step that every rank of the stage takes, so that whoever keeps the others waiting can be named.

        Args:
            peer: the rank that it is taken with, None for the stage.
        """

    @abstractmethod
    def blame(self) -> str:
        """After the timeout: what is to be said of whoever keeps this rank waiting; empty when it is not known."""

    def close(self) -> None:  # noqa: B027
        """Take leave; nobody waits."""

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count one exchange and its seconds."""
        started = time.perf_counter()
        yield
        self.spent.count += 1
        self.spent.seconds += time.perf_counter() - started


def stalled(ranks: Iterable[int], timeout: float, process: str = "") -> str:
    """What is said of ranks that keep the others waiting."""
    names = ", ".join(map(str, ranks)) or "another"
    return (f"rank {names}{process} has kept the others waiting for {timeout:g} s: it is stopped or overloaded; give a "
            "longer timeout if it is only slow")
