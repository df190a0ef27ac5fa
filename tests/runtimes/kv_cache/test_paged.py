"""Block tables of sequences: random growing, forgetting, forking and dropping, against lists of what was written."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdgraph.errors import HerdError
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes.kv_cache.paged import BlockTable, CachePools, PagedCache
from herdgraph.runtimes.kv_cache.pool import BLOCK_TOKENS, BlockPool, HostBlocks

BYTES = 4 * BLOCK_TOKENS
"""A block of one layer's keys: a stamp of 4 bytes for each token."""


def _pools(chunk: int, blocks: int) -> CachePools:
    """Pools for so many blocks of the largest kind."""
    text = replace(TINY.text, attention_chunk_size=chunk, chunked_layers=(chunk > 0,) * 3 + (False,))
    return CachePools.of(text, BYTES, blocks * 2 * BYTES * 4)


class Writer:
    """A sequence as an executor writes it; ``stamps`` is what it has to find again."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache, self.stamps, self.written = cache, list[int](), 0

    def append(self, stamps: list[int]) -> None:
        """Write up to the end of the attention chunk, as a call does."""
        chunk, first = self.cache.pools.chunk, len(self.stamps)
        stamps = stamps[: chunk - first % chunk] if chunk else stamps
        self.cache.make_room(first, first + len(stamps))
        self.stamps += stamps
        self.written = len(self.stamps)
        for table, pool, slot in self._tables(first):
            for index, stamp in enumerate(stamps, slot):
                for arrays in (pool.keys, pool.values):
                    for array in arrays.values():
                        array[table.numbers[index // BLOCK_TOKENS]].view(np.uint32)[index % BLOCK_TOKENS] = stamp

    def truncate(self, length: int) -> None:
        """Forget; a chunk that was left before is written anew, as runners do."""
        chunk, again = self.cache.pools.chunk, list[int]()
        if chunk and length % chunk and (self.written - 1) // chunk != (length - 1) // chunk:
            again = self.stamps[length // chunk * chunk : length]
        self.stamps = self.stamps[: length - len(again)]
        self.cache.truncate(len(self.stamps))
        if again:
            self.append(again)

    def fork(self) -> Writer:
        twin = Writer(self.cache.fork(len(self.stamps)))
        twin.stamps, twin.written = self.stamps.copy(), self.written
        return twin

    def _tables(self, position: int) -> list[tuple[BlockTable, BlockPool, int]]:
        """Tables with their pools, and the slot of a position."""
        pools = self.cache.pools
        whole = (self.cache.whole, pools.whole, position)
        return [whole, (self.cache.chunked, pools.chunked, position % pools.chunk)] if pools.chunk else [whole]

    def check(self) -> None:
        """Every position that attention can ask for holds what was written there."""
        for table, pool, slots in self._tables(len(self.stamps)):
            if table is self.cache.chunked and self.written != len(self.stamps):
                continue  # cut off: the next chunk begins, or the last one is written anew
            is_full = table is self.cache.chunked and self.stamps and not slots
            count = self.cache.pools.chunk if is_full else slots
            wanted = self.stamps[len(self.stamps) - count :]
            for arrays in (pool.keys, pool.values):
                for array in arrays.values():
                    found = [array[block].view(np.uint32) for block in table.numbers]
                    assert np.concatenate([np.zeros(0, np.uint32), *found])[:count].tolist() == wanted


def _check_counts(pools: CachePools, writers: list[Writer]) -> None:
    """A block is referred to as often as it stands in tables, and the budget counts each once."""
    used = 0
    for pool, tables in ((pools.whole, [w.cache.whole for w in writers]),
                         (pools.chunked, [w.cache.chunked for w in writers])):
        counts = Counter(int(block) for table in tables for block in table.numbers)
        references = pool._references
        assert counts == {block: count for block, count in enumerate(references) if count}
        assert sorted(pool._free) == [block for block, count in enumerate(references) if not count]
        used += pool.cost * len(counts)
    assert pools.budgets[0].used == used <= pools.budgets[0].most


ACTIONS = st.lists(st.tuples(st.sampled_from(["append", "append", "append", "truncate", "fork", "drop", "new"]),
                             st.integers(0, 1 << 16), st.integers(1, 150)), min_size=1, max_size=20)


@settings(max_examples=80)
@given(ACTIONS, st.sampled_from([0, 5, 16, 64, 100, 130]), st.integers(3, 12))
def test_random_lives_of_sequences(actions: list[tuple[str, int, int]], chunk: int, blocks: int) -> None:
    pools = _pools(chunk, blocks)
    writers = [Writer(PagedCache(pools))]
    stamp, refusals = 0, list[str]()
    for action, which, count in actions:
        if action == "new" or not writers:
            writers.append(Writer(PagedCache(pools)))
            continue
        writer = writers[which % len(writers)]
        before = (list(writer.stamps), writer.cache.whole.numbers.copy(), writer.cache.chunked.numbers.copy())
        try:
            if action == "append":
                stamp += count
                writer.append(list(range(stamp - count + 1, stamp + 1)))
            elif action == "truncate":
                writer.truncate(count % (len(writer.stamps) + 1))
            elif action == "fork":
                writers.append(writer.fork())
            else:
                writers.remove(writer)
        except HerdError as error:
            refusals.append(str(error))
            if action == "append":
                assert before[0] == writer.stamps
                np.testing.assert_array_equal(writer.cache.whole.numbers, before[1])
                np.testing.assert_array_equal(writer.cache.chunked.numbers, before[2])
        del writer
        _check_counts(pools, writers)
        for index in range(len(writers)):
            writers[index].check()
    writers.clear()
    assert all(text.startswith("keys and values") and "\n" not in text for text in refusals)
    assert pools.budgets[0].used == 0, "nothing leaks"


def test_a_fork_shares_all_and_copies_what_it_writes() -> None:
    pools = _pools(16, 20)
    writer = Writer(PagedCache(pools))
    for first in range(0, 80, 16):
        writer.append(list(range(first + 1, first + 17)))
    used = pools.budgets[0].used
    twin = writer.fork()
    assert pools.budgets[0].used == used
    np.testing.assert_array_equal(twin.cache.whole.numbers, writer.cache.whole.numbers)
    twin.append([1000])
    assert twin.cache.whole.numbers[0] == writer.cache.whole.numbers[0], "a full block stays shared"
    assert twin.cache.whole.numbers[1] != writer.cache.whole.numbers[1]
    writer.check()
    twin.check()


def test_chunked_blocks_go_when_the_chunk_ends() -> None:
    pools = _pools(130, 20)
    writer = Writer(PagedCache(pools))
    writer.append([7] * 130)
    assert (len(writer.cache.whole.numbers), len(writer.cache.chunked.numbers)) == (3, 3)
    assert writer.cache.nbytes == pools.budgets[0].used
    writer.append([8])
    assert (len(writer.cache.whole.numbers), len(writer.cache.chunked.numbers)) == (3, 1)


def test_a_new_chunk_uses_what_the_last_one_gives_back() -> None:
    """A full budget is no obstacle where a sequence needs no more than it has."""
    pools = _pools(64, 1)
    writer = Writer(PagedCache(pools))
    writer.append([7] * 64)
    assert pools.budgets[0].used == pools.budgets[0].most
    writer.truncate(64)
    with pytest.raises(HerdError, match="keys and values need"):
        writer.append([8])  # a second block of the layer that sees everything
    assert len(writer.cache.chunked.numbers) == 1
    assert writer.cache.missing(64, 65) == {pools.budgets[0]: pools.whole.cost}


def test_tables_grow() -> None:
    pools = _pools(0, 100)
    table = BlockTable(pools.whole)
    table.make_room(0, 40 * BLOCK_TOKENS)
    np.testing.assert_array_equal(table.numbers, range(40))


def test_memory_that_is_there_or_not_is_divided() -> None:
    """Sequences two chunks long fill both parts; what one part lacks, the other cannot give."""
    text = replace(TINY.text, attention_chunk_size=128, chunked_layers=(True, True, True, False))
    pools = CachePools.of(text, 100, 40 * 1000, memory=HostBlocks(block_tokens=32, is_lazy=False))
    whole, chunked = pools.budgets
    assert (whole.most, chunked.most) == (16_000, 24_000), "2 · 1 layer to 3"
    assert pools.most_tokens() == 80 * 32, "a block of 200 bytes in the layer that sees all of it"
    caches = [PagedCache(pools) for _ in range(10)]
    for cache in caches:
        cache.make_room(0, 128)
    assert (whole.used, chunked.used) == (10 * 4 * 200, 10 * 4 * 600)
    with pytest.raises(HerdError, match="keys and values need 600 B more and have 0 B of their 24"):
        PagedCache(pools).make_room(0, 1)
    caches[0].make_room(128, 129)  # a new chunk gives back the blocks of the last one
    assert (whole.used, chunked.used) == (41 * 200, 37 * 600)
    del caches, cache
    assert (whole.used, chunked.used) == (0, 0)


def test_layers_of_one_kind_have_all_the_memory() -> None:
    pools = _divided(chunked=False)
    assert [budget.most for budget in pools.budgets] == [40_000]
    assert pools.most_tokens() == 50 * 32
    pools = _divided(chunked=True)
    assert [budget.most for budget in pools.budgets] == [40_000]
    assert pools.most_tokens() > 1 << 30, "a chunk is all that is kept"


def _divided(*, chunked: bool) -> CachePools:
    text = replace(TINY.text, attention_chunk_size=128, chunked_layers=(chunked,) * 4)
    return CachePools.of(text, 100, 40 * 1000, memory=HostBlocks(block_tokens=32, is_lazy=False))
