"""The loader: one stream for a seed, dealt to any number of ranks, going on where it stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herdgraph.errors import HerdError
from herdgraph.model.data import Record
from herdgraph.model.training.data import Batch, Encoded, Loader
from herdgraph.model.training.data.stream import Unseen, order

COUNT, LENGTH = 60, 32


class Numbers:
    """Samples that are numbers; every seventh may be broken."""

    def __init__(self, count: int = COUNT) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        return Record(str(index), f"numbers line {index + 1}", document=(str(index),))

    def key(self, index: int) -> str:
        return str(index)


class Encode:
    """Sample n as 3 to 13 tokens n + 1."""

    max_tokens = LENGTH

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self._broken = broken

    def __call__(self, record: Record) -> Encoded:
        number = int(record.key)
        if number in self._broken:
            raise HerdError(f"{record.origin}: broken")
        length = 3 + number * 7 % 11
        return Encoded(record.key, np.full(length, number + 1), np.ones(length, bool), None, number % 5 == 0)


def loader(**options: Any) -> Loader:
    samples, encode = options.pop("samples", Numbers()), options.pop("encode", Encode())
    return Loader(samples, encode, **{"rows": 2, "seq_len": LENGTH, "seed": 3, **options})


def members(batch: Batch) -> list[int]:
    """Numbers of a batch's samples."""
    found = []
    for ids, documents in zip(batch.input_ids_BT, batch.document_BT, strict=True):
        found += [int(ids[documents == n][0]) - 1 for n in documents.unique().tolist() if n >= 0]
    return found


def take(source: Loader, count: int) -> list[Batch]:
    return list(islice(iter(source), count))


def equal(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.input_ids_BT, b.input_ids_BT) and torch.equal(a.document_BT, b.document_BT)
        for a, b in zip(left, right, strict=True)
    )


def test_the_same_seed_gives_the_same_stream() -> None:
    assert equal(take(loader(), 20), take(loader(), 20))
    assert not equal(take(loader(), 3), take(loader(seed=4), 3))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_an_epoch_has_every_sample_once(world: int) -> None:
    ranks = [loader(world=world, rank=rank, epochs=1) for rank in range(world)]
    found = [number for rank in ranks for batch in rank for number in members(batch)]
    assert sorted(found) == list(range(COUNT))
    assert sum(rank.counts["used"] for rank in ranks) == COUNT
    assert sum(rank.counts["cut"] for rank in ranks) == COUNT // 5


def test_epochs_differ_in_order() -> None:
    first, second = order(0, 0, 50), order(0, 1, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert (first != second).any()


def test_without_shuffle() -> None:
    found = [members(batch) for batch in loader(shuffle=False, epochs=1, rows=1)]
    assert [number for batch in found for number in batch] == list(range(COUNT))
    assert all(max(a) < min(b) for a, b in pairwise(found))


@pytest.mark.parametrize("stop", [0, 1, 5, 17])
def test_resumed_streams_are_identical(stop: int) -> None:
    whole, first = loader(world=2, rank=1), loader(world=2, rank=1)
    expected = take(whole, stop + 15)
    start = take(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    second = loader(world=2, rank=1)
    second.load_state_dict(state)
    assert equal([*start, *take(second, 15)], expected)
    assert second.counts == whole.counts


def test_state_between_batches_of_one_iterator() -> None:
    source = loader()
    batches = iter(source)
    next(batches)
    state = source.state_dict()
    expected = next(batches)
    other = loader()
    other.load_state_dict(state)
    assert equal(take(other, 1), [expected])


worlds = st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(0, 4), min_size=4, max_size=4)), max_size=4)


@given(worlds)
def test_other_numbers_of_ranks_lose_nothing(phases: list[tuple[int, list[int]]]) -> None:
    """However often a run is interrupted and by how many ranks continued: what was read, counted over epochs, and what
    the last state calls unseen are the whole stream."""
    seen: Counter[int] = Counter()
    states: list[dict[str, Any]] | None = None
    for world, batches in [*phases, (2, [40, 40])]:
        ranks = [loader(world=world, rank=rank) for rank in range(world)]
        for rank, count in zip(ranks, batches, strict=False):
            if states is not None:
                rank.load_state_dict(states)
            seen.update(number for batch in take(rank, count) for number in members(batch))
        states = [rank.state_dict() for rank in ranks]
    assert states is not None
    unseen = Unseen(tuple(states[0]["leftover"]), states[0]["start"]).after([s["taken"] for s in states])
    read = Counter(dict.fromkeys(range(COUNT), unseen.start // COUNT))
    read.update(int(n) for n in order(3, unseen.start // COUNT, COUNT)[: unseen.start % COUNT])
    read.subtract(int(order(3, p // COUNT, COUNT)[p % COUNT]) for p in unseen.leftover)
    assert {n: c for n, c in seen.items() if c} == {n: c for n, c in read.items() if c}


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_unseen_positions(first: list[int], second: list[int]) -> None:
    def dealt(unseen: Unseen, taken: list[int]) -> Iterator[int]:
        for rank, count in enumerate(taken):
            yield from (unseen.position(turn * len(taken) + rank) for turn in range(count))

    once = Unseen().after(first)
    seen = [*dealt(Unseen(), first), *dealt(once, second)]
    rest = [once.after(second).position(place) for place in range(100)]
    assert len(set(seen)) == len(seen)
    assert sorted([*seen, *rest])[:100] == list(range(100))
    assert rest == sorted(rest)


def test_states_that_do_not_fit() -> None:
    states = [loader(world=2, rank=rank).state_dict() for rank in range(2)]
    with pytest.raises(HerdError, match="has samples 60, this run's 61"):
        loader(samples=Numbers(61)).load_state_dict(states)
    with pytest.raises(HerdError, match="has seed 3, this run's 4"):
        loader(seed=4, world=2).load_state_dict(states)
    with pytest.raises(HerdError, match=r"is of 2 ranks, states of ranks \[0\]"):
        loader(world=3).load_state_dict(states[0])


def test_broken_samples_stop_or_are_counted() -> None:
    broken = (3, 10, 59)
    with pytest.raises(HerdError, match=r"numbers line \d+: broken; correct it, or choose to skip"):
        list(loader(encode=Encode(broken), epochs=1))
    source = loader(encode=Encode(broken), epochs=1, broken="skip")
    found = sorted(number for batch in source for number in members(batch))
    assert found == sorted(set(range(COUNT)) - set(broken))
    assert (source.counts["used"], source.counts["skipped"]) == (COUNT - 3, 3)
    assert sorted(source.skipped) == sorted(f"numbers line {n + 1}: broken" for n in broken)
    with pytest.raises(HerdError, match="none of the 60 samples can be used"):
        take(loader(encode=Encode(tuple(range(COUNT))), broken="skip"), 1)


def test_impossible_loaders() -> None:
    with pytest.raises(HerdError, match="samples may have 32 tokens and rows only 16"):
        loader(seq_len=16)
    with pytest.raises(HerdError, match="there are no samples"):
        loader(samples=Numbers(0))


def test_progress_in_epochs() -> None:
    source = loader()
    assert source.epoch == 0
    take(source, 30)
    assert 1 < source.epoch < 10
