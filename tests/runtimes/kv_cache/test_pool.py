"""Cache blocks: who refers to them is counted, the lowest free one is next, and the budget holds."""

from __future__ import annotations

import pytest

from herdgraph.errors import HerdError
from herdgraph.model.quantization.recipes import Caches
from herdgraph.runtimes.kv_cache.pool import BlockPool, CacheBudget, block_bytes, caches_of_block


def _pool(blocks: int, layers: int = 2) -> BlockPool:
    return BlockPool(range(layers), 10, CacheBudget(blocks * 20 * layers))


def test_the_lowest_free_block_is_next() -> None:
    pool = _pool(4)
    assert [pool.allocate() for _ in range(4)] == [0, 1, 2, 3]
    pool.release([2, 0])
    assert [pool.allocate(), pool.allocate()] == [0, 2]
    assert pool.budget.used == pool.budget.most == 160


def test_a_block_is_free_when_nobody_refers_to_it() -> None:
    pool = _pool(1)
    block = pool.allocate()
    assert pool.share(block) == block
    pool.release([block])
    with pytest.raises(HerdError, match=r"^keys and values fill their 40 B: end sequences, or load the engine with"):
        pool.allocate()
    pool.release([block])
    assert pool.allocate() == block


def test_a_shared_block_is_copied_in_every_layer() -> None:
    pool = _pool(2)
    block = pool.allocate()
    assert pool.own(block) == block, "nobody else has it"
    for number, array in enumerate([*pool.keys.values(), *pool.values.values()]):
        array[block] = 1 + number
    copy = pool.own(pool.share(block))
    assert (copy, pool.is_shared(block), pool.is_shared(copy)) == (1, False, False)
    found = [array[copy].tolist() for array in (*pool.keys.values(), *pool.values.values())]
    assert found == [[1 + number] * 10 for number in range(4)]


def test_pools_share_a_budget() -> None:
    budget = CacheBudget(100)
    one, other = BlockPool([0], 10, budget), BlockPool([1, 2], 10, budget)
    assert (one.capacity, other.capacity) == (5, 2), "each could use all of it"
    one.allocate()
    other.allocate()
    budget.require(40)
    with pytest.raises(HerdError, match=r"^keys and values need 41 B more and have 40 B of their 100 B: [^\n]*$"):
        budget.require(41)
    other.allocate()
    with pytest.raises(HerdError, match="fill their 100 B"):
        one.allocate()


def test_a_pool_of_no_layers_takes_nothing() -> None:
    pool = BlockPool([], 10, CacheBudget(1000))
    assert (pool.capacity, pool.cost, pool.keys) == (0, 0, {})


@pytest.mark.parametrize(("heads", "dim"), [(2, 16), (8, 128), (1, 5)])
@pytest.mark.parametrize("caches", ["float", "float16", "int8"])
def test_the_size_of_a_block_says_what_it_holds(heads: int, dim: int, caches: Caches) -> None:
    size = block_bytes(heads, dim, caches)
    assert caches_of_block(size, heads, dim) == caches
    assert caches_of_block(size + 1, heads, dim) is None
