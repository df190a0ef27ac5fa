"""Cache blocks: keys and values of some tokens each, 64 on a CPU, in pools that all sequences of an engine share.

A block of a pool has a place in every layer of the pool's kind. Whoever refers to a block counts in; a block that
nobody refers to is handed out again, the lowest first. On the host a pool reserves addresses, not memory: the operating
system provides a page when it is first written. So all pools of an engine can be as large as the budget that they
share. Memory of a device is there or not: pools have budgets of their own (``CachePools``).
"""

from __future__ import annotations

import heapq
import mmap
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...errors import HerdError
from ...files import size

BLOCK_TOKENS = 64
"""Tokens of a cache block on the host."""
_PRIVATE: Any = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_DIMENSION = 16
"""Heads are filled up to a multiple of it."""
_ELEMENT_BYTES = {"float": 4, "float16": 2, "int8": 1}
"""By how keys and values are stored."""

_SHARE = 0.5
"""Of the memory that is free when an engine is loaded: what keys and values may use unless somebody says otherwise."""
_SMALL_PAGES = 4 << 20
"""Bytes of every array that stay in small pages: short sequences take no more memory than they need."""
_MEMORY = Path("/proc/meminfo")
_CURE = "a larger cache_bytes (gpu_memory on a GPU)"

Array = np.ndarray[Any, Any]


def block_bytes(heads: int, head_dim: int, caches: str) -> int:
    """Bytes of a block of one layer's keys, and as many of its values; 8-bit ones have a float32 scale per token."""
    elements = heads * BLOCK_TOKENS * -(-head_dim // _DIMENSION) * _DIMENSION
    scales = 4 * heads * BLOCK_TOKENS if caches == "int8" else 0
    return elements * _ELEMENT_BYTES[caches] + scales


def caches_of_block(count: int, heads: int, head_dim: int) -> str | None:
    """How keys and values are stored in blocks of so many bytes, None where no way gives as many."""
    return next((kind for kind in _ELEMENT_BYTES if block_bytes(heads, head_dim, kind) == count), None)


class BlockMemory(Protocol):
    """Where blocks lie, and how one is copied."""

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""

    @property
    def is_lazy(self) -> bool:
        """Whether memory is taken when it is written, so that pools may reserve more than there is."""

    def reserve(self, blocks: int, block_bytes: int) -> Any:
        """Room for so many blocks of one layer's keys, or values."""

    def copy(self, rooms: Iterable[Any], source: int, target: int) -> None:
        """Copy a block over another in each of several rooms."""


@dataclass(frozen=True)
class HostBlocks:
    """Blocks in the host's memory; see ``BlockMemory``."""

    block_tokens: int = BLOCK_TOKENS
    is_lazy: bool = True

    def reserve(self, blocks: int, block_bytes: int) -> Array:
        """See ``BlockMemory``: uint8 [blocks, bytes]."""
        return reserved(blocks, block_bytes)

    def copy(self, rooms: Iterable[Array], source: int, target: int) -> None:
        """See ``BlockMemory``."""
        for room in rooms:
            room[target] = room[source]


HOST_BLOCKS = HostBlocks()


@dataclass(eq=False)
class CacheBudget:
    """Bytes that the pools of an engine may use together, or one of them alone.

    Attributes:
        most: the limit.
        used: bytes of blocks that somebody refers to.
        lock: held while blocks are counted; finalizers of sequences may run at any time, in the same thread too.
    """

    most: int
    used: int = 0
    lock: Any = field(default_factory=threading.RLock)

    def has(self, count: int) -> bool:
        """Whether so many bytes are left."""
        return self.used + count <= self.most

    def require(self, count: int) -> None:
        """Refuse what would not fit beside what is used now.

        Raises:
            HerdError: so many bytes do not fit.
        """
        if not self.has(count):
            raise HerdError(f"keys and values need {size(count)} more and have {size(self.most - self.used)} of their "
                            f"{size(self.most)}: end sequences, or load the engine with {_CURE}")


class BlockPool:
    """Cache blocks of the layers of one kind.

    Args:
        layers: their numbers.
        block_bytes: of one layer's keys in a block, and as many of its values.
        budget: shared with other pools, where memory is taken as it is written.
        counted: layers that a block is paid for: those of the rank that holds most, None for ``layers``.
        memory: where the blocks lie.

    Attributes:
        budget: see above.
        tokens: of a block.
        cost: bytes of a block in all layers.
        capacity: blocks that the pool has addresses for.
        keys: by layer, what ``memory`` reserved; on the host uint8 [blocks, ``block_bytes``].
        values: the same.
        copied: called with the numbers of a block and of its copy.
    """

    def __init__(
        self, layers: Iterable[int], block_bytes: int, budget: CacheBudget, counted: int | None = None,
        memory: BlockMemory = HOST_BLOCKS,
    ) -> None:
        numbers = list(layers)
        paid = len(numbers) if counted is None else counted
        self.budget, self._memory, self.tokens = budget, memory, memory.block_tokens
        self.cost = 2 * block_bytes * paid
        self.capacity = max(1, budget.most // max(1, self.cost)) if paid else 0
        self.copied: Callable[[int, int], None] = _nobody_else
        self.keys, self.values = (
            {layer: memory.reserve(self.capacity, block_bytes) for layer in numbers} for _ in range(2))
        self._references: list[int] = []
        self._free: list[int] = []

    def allocate(self) -> int:
        """A block that nobody else refers to.

        Raises:
            HerdError: the budget is used up.
        """
        budget = self.budget
        with budget.lock:
            if not budget.has(self.cost) or (not self._free and len(self._references) == self.capacity):
                raise HerdError(f"keys and values fill their {size(budget.most)}: end sequences, or load the engine "
                                f"with {_CURE}")
            budget.used += self.cost
            if not self._free:
                self._references.append(0)
                self._free.append(len(self._references) - 1)
            block = heapq.heappop(self._free)
            self._references[block] = 1
            return block

    def is_shared(self, block: int) -> bool:
        """Whether a second one refers to a block."""
        return self._references[block] > 1

    def share(self, block: int) -> int:
        """Refer to a block once more; returns it."""
        with self.budget.lock:
            self._references[block] += 1
        return block

    def release(self, blocks: Iterable[int]) -> None:
        """Refer to blocks once less."""
        with self.budget.lock:
            for block in blocks:
                self._references[block] -= 1
                if not self._references[block]:
                    self.budget.used -= self.cost
                    heapq.heappush(self._free, block)

    def own(self, block: int) -> int:
        """The block itself where nobody else refers to it, otherwise a copy; the reference moves to it."""
        if self._references[block] == 1:
            return block
        twin = self.allocate()
        self.copy(block, twin)
        self.copied(block, twin)
        self.release([block])
        return twin

    def copy(self, block: int, twin: int) -> None:
        """Write what is in a block to another one."""
        self._memory.copy((*self.keys.values(), *self.values.values()), block, twin)


def _nobody_else(block: int, twin: int) -> None:
    """Who has all of a block need not tell others of its copy."""


def reserved(blocks: int, block_bytes: int) -> Array:
    """Zeros, uint8 [blocks, bytes], in pages of their own that take memory when they are written.

    Where much is used, huge pages are faster and waste little: all but the beginning asks for them.
    """
    count = blocks * block_bytes
    region = mmap.mmap(-1, max(1, count), **_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE") and count > _SMALL_PAGES:
        region.madvise(mmap.MADV_HUGEPAGE, _SMALL_PAGES, count - _SMALL_PAGES)
    return np.frombuffer(region, np.uint8)[:count].reshape(blocks, block_bytes)


def free_cache_bytes() -> int:
    """Half of the memory that is free, where the operating system tells; otherwise 2 GB."""
    if not _MEMORY.exists():
        return 2 << 30
    lines = _MEMORY.read_text(encoding="ascii").splitlines()
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 4 << 30)
    return int(free * _SHARE)
