"""Batched decoding: the same logits as alone, whatever the lengths and the company."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes import Engine, Sequence
from herdgraph.runtimes.executors.runner import PREFILL_CHUNK, SCORES_BYTES, SHORTEST_CHUNK
from support import herds

LENGTHS = [3, 40, 15, 16, 1]
"""Below, across and exactly at multiples of the chunk of 16."""


RECIPES = ["fp32", "int8", "int4"]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Engine]:
    """An engine of a target and a recipe, loaded once."""
    directory = tmp_path_factory.mktemp("batch")
    herds.save(TINY, directory / "checkpoint")

    @cache
    def loaded(target: str, recipe: str) -> Engine:
        bundle = directory / f"{target}-{recipe}"
        with open_checkpoint(directory / "checkpoint") as checkpoint:
            build_bundle(checkpoint, bundle, target=target, recipe=recipe)
        return Engine.load(bundle, threads=1)

    return loaded


@pytest.fixture(params=[(target, recipe) for target in ("cpu", "cpu-stock") for recipe in RECIPES], ids="-".join)
def engine(request: pytest.FixtureRequest, load: Callable[[str, str], Engine]) -> Engine:
    return load(*request.param)


@pytest.fixture(params=RECIPES)
def stock(request: pytest.FixtureRequest, load: Callable[[str, str], Engine]) -> Engine:
    return load("cpu-stock", request.param)


def _sequences(engine: Engine) -> list[Sequence]:
    sequences = []
    for seed, length in enumerate(LENGTHS):
        sequence = engine.new_sequence()
        engine.prefill(sequence, herds.tokens(length, seed))
        sequences.append(sequence)
    return sequences


def _close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_a_batch_gives_what_each_gives_alone(engine: Engine) -> None:
    together, alone = _sequences(engine), _sequences(engine)
    for step in range(20):  # every sequence crosses a chunk, at different steps
        tokens = herds.tokens(len(LENGTHS), 100 + step)
        found = engine.decode_batch(together, tokens)
        wanted = np.stack([engine.decode(sequence, token) for sequence, token in zip(alone, tokens, strict=True)])
        _close(found, wanted)
    assert [len(sequence) for sequence in together] == [length + 20 for length in LENGTHS]


def test_the_same_batch_copies_nothing_and_another_does(stock: Engine) -> None:
    engine = stock
    together, alone = _sequences(engine), _sequences(engine)
    engine.decode_batch(together, [5] * 5)
    first = engine._decoder._batches[0]
    engine.decode_batch(together, [6] * 5)
    assert engine._decoder._batches[0] is first
    swapped = [together[4], together[0]]
    found = engine.decode_batch(swapped, [7, 8])
    assert engine._decoder._batches[0] is not first
    for sequence, tokens in ((alone[4], (5, 6, 7)), (alone[0], (5, 6, 8))):
        for token in tokens:
            wanted = engine.decode(sequence, token)
        _close(found[0 if sequence is alone[4] else 1], wanted)


def test_a_sequence_of_a_batch_goes_on_alone(engine: Engine) -> None:
    together, alone = _sequences(engine), _sequences(engine)
    engine.decode_batch(together, [5] * 5)
    engine.decode(alone[1], 5)
    twin = together[1].fork()
    _close(engine.decode(together[1], 9), engine.decode(alone[1], 9))
    more = herds.tokens(300, 7)  # outgrows its row
    _close(engine.prefill(together[1], more), engine.prefill(alone[1], more))
    engine.truncate(alone[1], 41)
    _close(engine.decode(twin, 11), engine.decode(alone[1], 11))
    engine.truncate(alone[1], 41)
    again = engine.decode_batch(together, [3] * 5)[1]
    engine.prefill(alone[1], [9, *more])
    _close(again, engine.decode(alone[1], 3))


def test_chunks_of_standard_operators_are_shorter_where_the_past_is_long(stock: Engine) -> None:
    heads, far = TINY.text.num_heads, 1 << 24
    assert 4 * heads * (far + PREFILL_CHUNK) * SHORTEST_CHUNK > SCORES_BYTES
    assert stock._decoder.chunk_len(0) == PREFILL_CHUNK
    assert stock._decoder.chunk_len(far) == SHORTEST_CHUNK


def test_wrong_batches(engine: Engine) -> None:
    sequence = engine.new_sequence()
    with pytest.raises(HerdError, match="1 sequences were given 2 tokens"):
        engine.decode_batch([sequence], [1, 2])
    with pytest.raises(HerdError, match="0 sequences"):
        engine.decode_batch([], [])
    with pytest.raises(HerdError, match="given twice"):
        engine.decode_batch([sequence, sequence], [1, 2])
    with pytest.raises(HerdError, match="outside of the vocabulary"):
        engine.decode_batch([sequence], [512])
