"""How the ranks of a sharded engine load and serve, as the caller says."""

from __future__ import annotations

import os
from collections.abc import Sequence as Items
from dataclasses import dataclass

from ...errors import HerdError
from .collectives import TIMEOUT


@dataclass(frozen=True)
class ShardOptions:
    """How a rank loads and serves.

    Attributes:
        threads: threads of one operator on every rank.
        verify: compare this rank's files with their hashes.
        prepack: copy weights into the layout that is fastest; see ``ExecutorOptions``.
        timeout: seconds that a rank may keep the others waiting in the middle of a call.
        devices: per rank the cores that it may use, such as ``0-3,8``; empty for any.
        cache_bytes: of a rank; see ``ExecutorOptions``.
        gpu_memory: of a rank; see ``ExecutorOptions``.
    """

    threads: int
    verify: bool = True
    prepack: bool = True
    timeout: float = TIMEOUT
    devices: tuple[str, ...] = ()
    cache_bytes: int | None = None
    gpu_memory: int | None = None


def check_devices(devices: Items[str] | None, ranks: int) -> tuple[str, ...]:
    """Devices of the ranks.

    Raises:
        HerdError: the bundle is whole, another number than ranks, or not lists of cores.
    """
    if devices is None:
        return ()
    if ranks == 1:
        raise HerdError("devices were given, but the bundle is not sharded: build it with --shards")
    if len(devices) != ranks:
        raise HerdError(f"{len(devices)} devices were given, the bundle is split for {ranks}: give one for each")
    for text in devices:
        cores(text)
    return tuple(devices)


def cores(text: str) -> set[int]:
    """Cores of a list such as ``0-3,8``.

    Raises:
        HerdError: not such a list.
    """
    found: set[int] = set()
    for part in str(text).split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdecimal() or (last and not last.strip().isdecimal()):
            raise HerdError(f"{text!r} is no list of cores: write it as 0-3,8")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def launched_externally() -> bool:
    """Whether somebody else has started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def threads_of(threads: int | None, ranks: int) -> int:
    """Threads of a rank: as asked, or the machine's cores shared by the ranks on it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) if launched_externally() else ranks
    return threads or max(1, (os.cpu_count() or 1) // max(1, local))
