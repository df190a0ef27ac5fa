"""What ranks exchange: sums, joined rows, hidden states, commands. The seam between a shard and its transport.

Two transports stand behind it: ``SharedMemory`` (shared_memory.py) where all ranks run on one machine, ``Gloo``
(gloo.py) where they do not. Every sum is taken in the order of the ranks, or taken once and handed out: all ranks of a
stage see the same bits, so that their copies of a router choose the same experts.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import HerdError

Array = np.ndarray[Any, Any]

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
    """This rank's exchanges with the others. All arrays are C-contiguous and stay where they are.

    Args:
        rank: index of this process.
        world: number of processes.
        group: the ranks of this one's stage, in order.

    Attributes:
        spent: count and seconds of all exchanges but commands.
    """

    def __init__(self, rank: int, world: int, group: range) -> None:
        self.rank, self.world, self.group = rank, world, group
        self.spent = Spent()

    @abstractmethod
    def all_reduce(self, value: Array, result: Array) -> None:
        """Sum of every rank's ``value`` over the stage; ``result`` has the same shape and may be the same array."""

    @abstractmethod
    def all_gather(self, value: Array, result: Array) -> None:
        """Every rank's ``value`` [..., n] side by side along the last axis: ``result`` [..., width · n]."""

    @abstractmethod
    def send(self, value: Array, target: int) -> None:
        """Hand an array to another rank."""

    @abstractmethod
    def receive(self, result: Array, source: int) -> None:
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

    def close(self) -> None:  # noqa: B027
        """Take leave; nobody waits."""

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count one exchange and its seconds."""
        started = time.perf_counter()
        yield
        self.spent.count += 1
        self.spent.seconds += time.perf_counter() - started
