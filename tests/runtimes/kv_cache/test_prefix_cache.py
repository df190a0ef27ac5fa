"""The prefix cache against a plain model of it: which prefixes are found, and that no block is lost or leaked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdgraph.model.config.presets import TINY
from herdgraph.runtimes.kv_cache.paged import CachePools, PagedCache
from herdgraph.runtimes.kv_cache.pool import BLOCK_TOKENS, block_bytes
from herdgraph.runtimes.kv_cache.prefix_cache import PrefixCache, PrefixKeys

CHUNK = 2 * BLOCK_TOKENS


def _pools(blocks: int) -> CachePools:
    """Room for so many blocks of both kinds."""
    text = replace(TINY.text, attention_chunk_size=CHUNK)
    size = block_bytes(text.num_kv_heads, text.head_dim, "float")
    small = CachePools.of(text, size, 1 << 20)
    return CachePools.of(text, size, blocks * (small.whole.cost + small.chunked.cost))


def _keys(ids: list[int], salt: bytes = b"") -> list[bytes]:
    keys = PrefixKeys(salt)
    keys.extend(ids)
    return keys.keys


def _compute(prefixes: PrefixCache, ids: list[int]) -> tuple[PagedCache, int]:
    """Take what is known, write the rest as a runner would, and publish it; how much was known."""
    keys = _keys(ids)
    cache, known = prefixes.take(keys, len(ids))
    at, published = known, known // BLOCK_TOKENS
    while at < len(ids):
        end = min(len(ids), at // CHUNK * CHUNK + CHUNK, at + 50)
        prefixes.evict(cache.missing(at, end))
        cache.make_room(at, end)
        at = end
        full = at // BLOCK_TOKENS
        prefixes.publish(keys[:full], cache, published)
        published = full
    return cache, known


def _text(branch: int, length: int) -> list[int]:
    """Texts that agree up to ``branch`` blocks."""
    return [1] * min(length, branch * BLOCK_TOKENS) + [2 + branch] * max(0, length - branch * BLOCK_TOKENS)


@pytest.mark.parametrize("spare", [0, 3])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9 * BLOCK_TOKENS)), min_size=1, max_size=8))
def test_found_prefixes_are_computed_ones_and_blocks_come_back(spare: int, texts: list[tuple[int, int]]) -> None:
    prefixes = PrefixCache(pools := _pools(12 + spare))
    computed: set[bytes] = set()
    for branch, length in texts:
        ids = _text(branch, length)
        cache, known = _compute(prefixes, ids)
        assert known <= length - 1
        assert set(_keys(ids)[: known // BLOCK_TOKENS]) <= computed
        assert len(cache.whole.numbers) == -(-length // BLOCK_TOKENS)
        computed |= set(_keys(ids))
        cache.truncate(0)
        assert prefixes.evictable_bytes(pools.budgets[0]) == pools.budgets[0].used
    prefixes.clear()
    assert pools.budgets[0].used == 0


def test_chunked_blocks_of_full_chunks_go_first_and_prefixes_shrink_to_a_chunk() -> None:
    prefixes = PrefixCache(pools := _pools(20))
    ids = _text(9, 5 * BLOCK_TOKENS + 1)
    _compute(prefixes, ids)[0].truncate(0)
    assert prefixes.take(_keys(ids), len(ids))[1] == 5 * BLOCK_TOKENS
    assert prefixes.take(_keys(ids), 4 * BLOCK_TOKENS)[1] == 3 * BLOCK_TOKENS
    prefixes.evict({pools.budgets[0]: pools.budgets[0].most - pools.budgets[0].used + 4 * pools.chunked.cost})
    assert prefixes.take(_keys(ids), len(ids))[1] == 5 * BLOCK_TOKENS, "the last chunk is still whole"
    assert prefixes.take(_keys(ids), 4 * BLOCK_TOKENS)[1] == 2 * BLOCK_TOKENS, "of earlier ones only ends are left"


def test_blocks_in_use_are_not_given_back() -> None:
    prefixes = PrefixCache(pools := _pools(8))
    cache, _ = _compute(prefixes, ids := _text(9, 3 * BLOCK_TOKENS))
    used = pools.budgets[0].used
    prefixes.evict({pools.budgets[0]: pools.budgets[0].most})
    assert prefixes.evictable_bytes(pools.budgets[0]) == 0
    in_use = pools.whole.cost * len(cache.whole.numbers) + pools.chunked.cost * len(cache.chunked.numbers)
    assert in_use <= pools.budgets[0].used < used
    assert prefixes.take(_keys(ids), len(ids) + 1)[1] == 3 * BLOCK_TOKENS


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    prefixes = PrefixCache(pools := _pools(20))
    first, second = _text(0, 3 * BLOCK_TOKENS), [7] * 3 * BLOCK_TOKENS
    for ids in (first, second):
        _compute(prefixes, ids)[0].truncate(0)
    for ids in (second, first):
        prefixes.touch(_keys(ids))
    of_full_chunks = 4 * pools.chunked.cost
    prefixes.evict({pools.budgets[0]: pools.budgets[0].most - pools.budgets[0].used + of_full_chunks + 1})
    assert prefixes.take(_keys(first), 400)[1] == 3 * BLOCK_TOKENS
    assert prefixes.take(_keys(second), 400)[1] == 2 * BLOCK_TOKENS


@pytest.mark.parametrize(("change", "equal"), [("nothing", 3), ("token 130", 2), ("token 70", 1), ("tile 1", 0),
                                               ("tile 0", 0), ("salt", 0)])
def test_keys_tell_tokens_pictures_and_tenants_apart(change: str, equal: int) -> None:
    """Two tiles of four tokens in the first block, the second over its end: so its pixels matter from there on."""
    ids = [5] * 20 + [500] * 4 + [5] * 38 + [500] * 4 + [5] * 126
    tiles = [b"a", b"b"]
    plain = PrefixKeys(b"", 500, 4, tiles)
    plain.extend(ids)
    if change.startswith("token"):
        ids[int(change.split()[1])] = 9
    if change.startswith("tile"):
        tiles[int(change.split()[1])] = b"c"
    other = PrefixKeys(b"x" if change == "salt" else b"", 500, 4, tiles)
    other.extend(ids)
    assert [a == b for a, b in zip(plain.keys, other.keys, strict=True)] == [index < equal for index in range(3)]


def test_keys_grow_with_their_tokens() -> None:
    ids = list(range(400))
    whole, grown = PrefixKeys(b"s"), PrefixKeys(b"s")
    whole.extend(ids)
    for end in (10, 64, 130, 131, 400):
        grown.extend(ids[:end])
    assert whole.keys == grown.keys
