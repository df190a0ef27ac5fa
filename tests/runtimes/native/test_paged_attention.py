"""PagedAttention against float64, on every unit: tables, chunks, caches, any split of a prompt, stale blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.native_packing import rounded
from support.paged_attention import CACHES, FLOAT32, INT8, NAMES, Case, Layer, attended, close

Node = Callable[..., Any]


def case(node: Node, layer: Layer, lengths: list[int], threads: int = 1, **more: int) -> Case:
    run = node("PagedAttention", layer.attributes(), {}, NAMES, outputs=3, threads=threads)
    return Case(layer, run, lengths, **more)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    kv_heads, dims = draw(st.integers(1, 3)), draw(st.sampled_from((2, 6, 16, 20, 24, 40, 64, 130)))
    return Layer(kv_heads * draw(st.integers(1, 5)), kv_heads, dims, draw(st.sampled_from((0, 0, 1, 16, 64, 100, 200))),
                 draw(st.sampled_from(CACHES)), *(draw(st.booleans()) for _ in range(4)))


def pieces(layer: Layer, length: int, sizes: Callable[[], int]) -> list[tuple[int, int]]:
    """A sequence cut into calls of some sizes, none of which crosses a chunk."""
    found, at = [], 0
    while at < length:
        room = layer.chunk - at % layer.chunk if layer.chunk else length
        found.append((at, min(sizes(), room, length - at)))
        at += found[-1][1]
    return found


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layer=layers(), lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4), threads=st.sampled_from((1, 2)),
       filling=st.sampled_from((0, 255)), seed=st.integers(0, 99))
def test_any_layer_in_any_pieces(node: Node, layer: Layer, lengths: list[int], threads: int, filling: int,
                                 seed: int) -> None:
    """Sequences together in random pieces, and each alone in others: the same bits, and the right numbers."""
    random = np.random.default_rng(seed)
    together = case(node, layer, lengths, threads, seed=seed, filling=filling)
    alone = case(node, layer, lengths, threads, seed=seed, filling=0)
    waiting = [pieces(layer, length, lambda: int(random.integers(1, 90))) for length in lengths]
    found: list[list[np.ndarray]] = [[] for _ in lengths]
    while any(waiting):
        parts = [(b, *queue.pop(0)) for b, queue in enumerate(waiting) if queue]
        outputs = np.split(together.step(parts), np.cumsum([count for *_, count in parts])[:-1])
        for (b, *_), y in zip(parts, outputs, strict=True):
            found[b].append(y)
    for b, length in enumerate(lengths):
        y = np.concatenate(found[b])
        assert close(y, together.meant((b, 0, length)), layer.cache)
        sizes = iter(int(size) for size in random.choice([1, 3, 40, 200], 1000, p=[0.3, 0.3, 0.2, 0.2]))
        others = [alone.step([(b, *piece)]) for piece in pieces(layer, length, lambda sizes=sizes: next(sizes))]
        assert np.array_equal(np.concatenate(others), y)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("threads", [1, 2])
def test_long_pasts_in_partial_results(node: Node, cache: int, threads: int) -> None:
    """Pasts over several partial results: one token and many read them the same."""
    layer = Layer(2, 1, 16, cache=cache)
    lengths = [2100, 1025]
    whole, single = case(node, layer, lengths, threads), case(node, layer, lengths, threads)
    for tested in (whole, single):
        tested.step([(0, 0, 2090), (1, 0, 1020)])
    y = whole.step([(0, 2090, 10), (1, 1020, 5)])
    assert close(y, np.concatenate([whole.meant((0, 2090, 10)), whole.meant((1, 1020, 5))]), cache)
    assert np.array_equal(np.concatenate([single.step([(0, 2090 + i, 1)]) for i in range(10)]), y[:10])


def test_keys_with_a_channel_that_stands_out_lose_little(node: Node) -> None:
    """Against rounding keys as they are, whose scales have to reach that channel."""
    layer = Layer(heads=2, kv_heads=1, dims=64, cache=INT8, norm=False, rotated=False)
    tested = case(node, layer, [60])
    tested.rows[0][:, 2 * 64 + 5] *= 50   # of the key
    x = tested.rows[0].astype(float).reshape(60, 4, 64)
    q, k, v = x[:, :2], x[:, 2:3].repeat(2, 1), x[:, 3:].repeat(2, 1)
    found, exact, plain = tested.step([(0, 0, 60)]), *(
        np.array([attended(q[t], keys[: t + 1], v[: t + 1]) for t in range(60)]) for keys in (k, rounded(k)))
    assert np.abs(found - exact).mean() < np.abs(plain - exact).mean() / 2


@pytest.mark.parametrize("cache", CACHES)
def test_other_bytes_of_the_cache_stay(node: Node, cache: int) -> None:
    """Blocks of nobody keep every byte."""
    tested = case(node, Layer(cache=cache), [5, 70], filling=123)
    tested.step([(0, 0, 5), (1, 0, 70)])
    free = sorted(set(range(len(tested.caches[0]))) - set(tested.table.ravel()))
    assert len(free) == 2
    assert all((cache[free] == 123).all() for cache in tested.caches)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (15, 3)])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_reaches_those_who_see_it_alone(node: Node, cache: int, heads: tuple[int, int], where: str) -> None:
    layer = Layer(*heads, dims=16, cache=cache, norm=False)
    clean, tested = case(node, layer, [9, 6]), case(node, layer, [9, 6])
    column = {"query": 0, "key": heads[0] * 16, "value": (heads[0] + heads[1]) * 16}[where]
    tested.rows[0][5, column : column + (heads[0] if where == "query" else heads[1]) * 16] = np.nan
    parts = [(0, 0, 9), (1, 0, 6)]
    y, want = tested.step(parts), clean.step(parts)
    hit = [5] if where == "query" else [5, 6, 7, 8]
    assert np.isnan(y[hit]).all()
    others = np.setdiff1d(np.arange(15), hit)
    assert np.array_equal(y[others], want[others])


@pytest.mark.parametrize("cache", CACHES)
def test_blocks_that_held_nan_are_used_again(node: Node, cache: int) -> None:
    """What a sequence left behind does not reach the next one in its blocks."""
    layer = Layer(cache=cache)
    tested, fresh = case(node, layer, [100]), case(node, layer, [100], seed=1)
    tested.rows[0][:] = np.nan
    assert np.isnan(tested.step([(0, 0, 100)])).all()
    tested.rows = fresh.rows
    fresh.table = tested.table
    for part in ((0, 0, 3), (0, 3, 1), (0, 4, 96)):
        assert np.array_equal(tested.step([part]), fresh.step([part]))


def changed(name: str, value: Any) -> Callable[[Case, dict[str, np.ndarray]], None]:
    def change(tested: Case, feed: dict[str, np.ndarray]) -> None:
        feed[name] = np.asarray(value, feed[name].dtype)
    return change


def with_block(number: int) -> Callable[[Case, dict[str, np.ndarray]], None]:
    def change(tested: Case, feed: dict[str, np.ndarray]) -> None:
        feed["table"] = feed["table"].copy()
        feed["table"][1, 0] = number
    return change


def cut(name: str) -> Callable[[Case, dict[str, np.ndarray]], None]:
    def change(tested: Case, feed: dict[str, np.ndarray]) -> None:
        feed[name] = np.ascontiguousarray(feed[name][:-1])
    return change


def narrower(name: str) -> Callable[[Case, dict[str, np.ndarray]], None]:
    def change(tested: Case, feed: dict[str, np.ndarray]) -> None:
        feed[name] = np.ascontiguousarray(feed[name][:, :-1])
    return change


MOST = 2**31 - 1
WRONG = {
    "a block behind the end": with_block(5),
    "a block far behind it": with_block(MOST),
    "a negative block": with_block(-1),
    "lengths that do not start at 0": changed("cumulative", [1, 3, 9]),
    "lengths that go back": changed("cumulative", [0, 12, 9]),
    "lengths that leave tokens": changed("cumulative", [0, 3, 8]),
    "negative lengths": changed("cumulative", [0, -3, 9]),
    "lengths of other sequences": changed("cumulative", [0, 9]),
    "no lengths": changed("cumulative", []),
    "a negative past": changed("past", [-1, 0]),
    "the largest past": changed("past", [MOST, 0]),
    "a past beyond the table": changed("past", [190, 0]),
    "pasts of other sequences": changed("past", [0]),
    "a short cos": cut("cos"),
    "a short sin": cut("sin"),
    "a short key": cut("key"),
    "a short value": cut("value"),
    "a short temperature": cut("temperature"),
    "a narrow query": narrower("query"),
    "no query": changed("query", np.ones((2, 0))),
    "a narrow cache": narrower("key_cache"),
    "another value cache": cut("value_cache"),
    "a table of one row": cut("table"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_inputs_are_refused(node: Node, wrong: str) -> None:
    """And leave the caches alone."""
    tested = case(node, Layer(tempered=True, packed=False), [3, 100])
    feed = tested.feed([(0, 0, 3), (1, 0, 6)])
    WRONG[wrong](tested, feed)
    with pytest.raises(Exception, match="PagedAttention: "):
        tested.run(**feed)


@pytest.mark.parametrize("attributes", [
    {"num_heads": 0}, {"num_heads": -4}, {"num_heads": 3}, {"num_heads": 7}, {"kv_num_heads": 0}, {"kv_num_heads": -2},
    {"kv_num_heads": 3}, {"kv_num_heads": 4}, {"cache_type": 3}, {"cache_type": -1}, {"cache_type": 1}, {"chunk": -1},
    {"chunk": 5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("packed", [True, False])
def test_wrong_attributes_are_refused(node: Node, attributes: dict[str, int], packed: bool) -> None:
    layer = Layer(packed=packed)
    tested = Case(layer, node("PagedAttention", layer.attributes() | attributes, {}, NAMES, outputs=3), [3, 100])
    with pytest.raises(Exception, match="PagedAttention: "):
        tested.step([(0, 0, 3), (1, 0, 6)])


@pytest.mark.parametrize("left_out", ["key", "value", "cos", "sin"])
def test_half_of_a_pair_is_refused(node: Node, left_out: str) -> None:
    tested = case(node, Layer(packed=False), [3])
    feed = tested.feed([(0, 0, 3)])
    del feed[left_out]
    with pytest.raises(Exception, match="PagedAttention: "):
        tested.run(**feed)


def test_a_head_of_odd_width_cannot_be_rotated(node: Node) -> None:
    tested = case(node, Layer(dims=15, rotated=False), [4])
    assert close(tested.step([(0, 0, 4)]), tested.meant((0, 0, 4)), FLOAT32)
    feed = tested.feed([(0, 0, 4)]) | {name: np.ones((4, 7), np.float32) for name in ("cos", "sin")}
    with pytest.raises(Exception, match="PagedAttention: "):
        tested.run(**feed)


def test_no_tokens(node: Node) -> None:
    tested = case(node, Layer(), [3, 3])
    assert tested.step([(0, 0, 0), (1, 0, 0)]).shape == (0, 80)
    y = tested.step([(0, 0, 0), (1, 0, 3)])
    assert close(y, tested.meant((1, 0, 3)), FLOAT32)
