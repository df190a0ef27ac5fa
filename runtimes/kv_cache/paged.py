"""The block tables of one sequence: which cache blocks hold its keys and values.

Layers that see their whole past have a block per 64 tokens (128 on a GPU). Chunked layers have those of the current
attention chunk alone: where a chunk ends they are released, and position p is slot p % chunk. ``fork`` and ``truncate``
change tables and nothing else; a block that two sequences share is copied when one of them writes to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...model.config import TextConfig
from .pool import HOST_BLOCKS, BlockMemory, BlockPool, CacheBudget

Array = np.ndarray[Any, Any]
_FIRST_BLOCKS = 16
_USUAL_CHUNKS = 2
"""Attention chunks that a usual sequence is long: what decides how memory that is not taken lazily is divided."""

Bytes = dict[CacheBudget, int]
"""Bytes of blocks, by the budget that they count in."""


def together(parts: Iterable[Bytes]) -> Bytes:
    """What several sequences take; one that gives back leaves nothing to the others."""
    found: Bytes = {}
    for part in parts:
        for budget, count in part.items():
            found[budget] = found.get(budget, 0) + max(0, count)
    return found


def require(needed: Bytes) -> None:
    """Refuse what does not fit beside what is used now.

    Raises:
        HerdError: so many bytes do not fit.
    """
    for budget, count in needed.items():
        budget.require(count)


@dataclass(frozen=True)
class CachePools:
    """The pools of an engine.

    Attributes:
        whole: of layers that see their whole past.
        chunked: of chunked layers.
        chunk: tokens of their attention chunk, 0 without such layers.
        element_bytes: that an element of keys or values takes.
    """

    whole: BlockPool
    chunked: BlockPool
    chunk: int
    element_bytes: float

    @property
    def budgets(self) -> list[CacheBudget]:
        """What pools may use: one budget for both, or one for each that has layers."""
        return list(dict.fromkeys(pool.budget for pool in (self.whole, self.chunked) if pool.capacity))

    @property
    def lock(self) -> Any:
        """Held while blocks are counted."""
        return self.whole.budget.lock

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self.whole.tokens

    @classmethod
    def of(
        cls, text: TextConfig, block_bytes: int, cache_bytes: int, stages: Items[TextConfig] = (),
        memory: BlockMemory = HOST_BLOCKS,
    ) -> CachePools:
        """Pools of a decoder, or of what one rank holds of it: pools of all ranks have blocks of the same numbers.

        Args:
            text: the decoder.
            block_bytes: of one layer's keys in a block, and as many of its values.
            cache_bytes: that all blocks may use together, on every rank.
            stages: what each stage of a pipeline holds.
            memory: where they lie.
        """
        everybody = stages or [text]
        chunks = {chunk for one in everybody for layer in range(one.num_layers) if (chunk := one.chunk_of(layer))}
        assert len(chunks) <= 1, "all chunked layers have chunks of one size"
        paid = [max(len(_layers(one, kind)) for one in everybody) for kind in (False, True)]
        budgets = _budgets(cache_bytes, paid[0], paid[1], memory)
        whole, chunked = (
            BlockPool(_layers(text, kind), block_bytes, budget, count, memory)
            for kind, count, budget in zip((False, True), paid, budgets, strict=True))
        element_bytes = block_bytes / (memory.block_tokens * text.num_kv_heads * text.head_dim)
        return cls(whole, chunked, max(chunks, default=0), element_bytes)

    def most_tokens(self) -> int:
        """Tokens of the longest sequence that the budget holds alone."""
        whole, chunked = (pool.cost if pool.capacity else 0 for pool in (self.whole, self.chunked))
        of_chunk, tokens = -(-self.chunk // self.block_tokens) * chunked, self.block_tokens
        most = sum(budget.most for budget in self.budgets)
        if len(self.budgets) > 1:
            held = self.chunked.budget.most
            return self.whole.budget.most // whole * tokens if held >= of_chunk else held // chunked * tokens
        if most < of_chunk + whole or not whole:
            return most // (whole + chunked) * tokens if whole else 1 << 40
        return (most - of_chunk) // whole * tokens

    def keys_and_values(self, layer: int) -> tuple[Any, Any]:
        """Keys and values of a layer, as the memory reserved them; on the host uint8 [blocks, bytes] each."""
        pool = self.whole if layer in self.whole.keys else self.chunked
        return pool.keys[layer], pool.values[layer]


def _budgets(cache_bytes: int, whole: int, chunked: int, memory: BlockMemory) -> list[CacheBudget]:
    """One budget that both pools share; or its parts, for sequences of a usual length.

    Args:
        cache_bytes: to be divided.
        whole: layers that see their whole past.
        chunked: chunked layers.
        memory: of the blocks.
    """
    if memory.is_lazy:
        return [CacheBudget(cache_bytes)] * 2
    of_chunked = cache_bytes * chunked // max(1, chunked + _USUAL_CHUNKS * whole)
    first = CacheBudget(cache_bytes - of_chunked)
    return [first, CacheBudget(of_chunked, lock=first.lock)]


def _layers(text: TextConfig, chunked: bool) -> list[int]:
    """Layers of one kind."""
    return [layer for layer in range(text.num_layers) if bool(text.chunk_of(layer)) == chunked]


class BlockTable:
    """Block numbers in the order of the tokens.

    Args:
        pool: where the blocks are.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool, self._numbers = pool, np.zeros(_FIRST_BLOCKS, np.int32)
        # A list, so that what runs when the table is gone does not refer to the table.
        self._held: list[int] = []
        weakref.finalize(self, pool.release, self._held).atexit = False

    @property
    def numbers(self) -> Array:
        """int32 [blocks]."""
        return self._numbers[: len(self._held)]

    def make_room(self, first: int, end: int) -> None:
        """Let slots ``first`` to ``end`` - 1 be written: blocks that are missing are added, a shared one is copied."""
        if first % self.pool.tokens and first < end:
            index = first // self.pool.tokens
            self._held[index] = self._numbers[index] = self.pool.own(self._held[index])
        while len(self._held) * self.pool.tokens < end:
            self._append(self.pool.allocate())

    def missing(self, first: int, end: int, *, anew: bool = False) -> int:
        """Blocks that ``make_room`` would take from the pool; after ``keep(0)`` where the table begins ``anew``.

        Blocks that beginning anew gives back count against those that it takes.
        """
        wanted = -(-end // self.pool.tokens)
        if anew:
            return wanted - sum(not self.pool.is_shared(block) for block in self._held)
        copied = first % self.pool.tokens and first < end and self.pool.is_shared(self._held[first // self.pool.tokens])
        return max(0, wanted - len(self._held)) + bool(copied)

    def keep(self, tokens: int) -> None:
        """Release what lies behind the first ``tokens`` slots."""
        count = -(-tokens // self.pool.tokens)
        self.pool.release(self._held[count:])
        del self._held[count:]

    def share(self, other: BlockTable, tokens: int) -> None:
        """Refer to the blocks of another table that hold its first ``tokens`` slots."""
        self.adopt(other._held[: -(-tokens // self.pool.tokens)])

    def adopt(self, blocks: Iterable[int]) -> None:
        """Go on with blocks that somebody else refers to as well."""
        for block in blocks:
            self._append(self.pool.share(block))

    def _append(self, block: int) -> None:
        count = len(self._held)
        if count == len(self._numbers):
            self._numbers = np.concatenate([self._numbers, np.zeros_like(self._numbers)])
        self._numbers[count] = block
        self._held.append(block)


class PagedCache:
    """Keys and values of one sequence.

    Args:
        pools: where its blocks are.

    Attributes:
        whole: the table of layers that see their whole past.
        chunked: the table of chunked layers.
    """

    def __init__(self, pools: CachePools) -> None:
        self.pools, self.whole, self.chunked = pools, BlockTable(pools.whole), BlockTable(pools.chunked)

    def make_room(self, first: int, end: int) -> bool:
        """Let positions ``first`` to ``end`` - 1 be written; those of chunked layers lie in one attention chunk.

        Tables are read anew for every call, so nothing that was bound moves. See ``SequenceCache``.

        Raises:
            HerdError: the pools are full; nothing has changed.
        """
        pools, chunk = self.pools, self.pools.chunk
        with pools.lock:
            require(self.missing(first, end))
            if chunk and first % chunk == 0:
                self.chunked.keep(0)
            if pools.whole.capacity:
                self.whole.make_room(first, end)
            if chunk:
                self.chunked.make_room(first % chunk, first % chunk + end - first)
        return False

    def missing(self, first: int, end: int) -> Bytes:
        """Bytes that ``make_room`` would take; less than none where it gives back more."""
        whole, chunked, chunk = self.pools.whole, self.pools.chunked, self.pools.chunk
        found = {whole.budget: whole.cost * self.whole.missing(first, end) if whole.capacity else 0}
        if chunk:
            slot = first % chunk
            count = chunked.cost * self.chunked.missing(slot, slot + end - first, anew=slot == 0)
            found[chunked.budget] = found.get(chunked.budget, 0) + count
        return found

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` positions, the last of which lies in the current attention chunk."""
        self.whole.keep(length)
        self.chunked.keep(self._slots_of_chunk(length))

    def fork(self, length: int) -> PagedCache:
        """The same first ``length`` positions for another sequence; nothing is copied."""
        twin = PagedCache(self.pools)
        twin.whole.share(self.whole, length)
        twin.chunked.share(self.chunked, self._slots_of_chunk(length))
        return twin

    def _slots_of_chunk(self, length: int) -> int:
        """Slots that the last chunk of so many positions fills; a full one stays until the next chunk begins."""
        chunk = self.pools.chunk
        return length - (length - 1) // chunk * chunk if chunk and length else 0

    @property
    def element_bytes(self) -> float:
        """See ``SequenceCache``."""
        return self.pools.element_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks, those that it shares included."""
        tables = ((self.whole, self.pools.whole), (self.chunked, self.pools.chunked))
        return sum(len(table.numbers) * pool.cost for table, pool in tables)
