"""Packing: nothing lost, nothing twice, no label across documents, tiles where their tokens are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herdgraph.errors import HerdError
from herdgraph.model.training.data import IGNORED, PADDING, Encoded, Rows

LENGTH, PATCH, PAD = 24, 999, 0


@st.composite
def samples(draw: st.DrawFn) -> list[Encoded]:
    """Samples that begin with a token of their own; a picture is two patch tokens and a tile of its own value."""
    found, following, tile = [], 1, 0
    for number in range(draw(st.integers(1, 12))):
        kinds = draw(st.lists(st.booleans(), min_size=2, max_size=12))
        ids, tiles = [1000 + number], []
        for is_picture in kinds:
            ids += [PATCH, PATCH] if is_picture else [following]
            following += 1
            if is_picture:
                tiles.append(np.full((1, 3, 2, 2), tile, np.float32))
                tile += 1
        flags = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        learned = np.array([flag and token != PATCH for flag, token in zip(flags, ids, strict=True)])
        found.append(Encoded(str(number), np.array(ids), learned, np.concatenate(tiles) if tiles else None))
    return found


@given(samples(), st.integers(1, 3))
def test_packing(given_samples: list[Encoded], count: int) -> None:
    rows = Rows(count, LENGTH)
    placed = []
    for sample in given_samples:
        if not rows.place(sample):
            break
        placed.append(sample)
    batch = rows.batch(PAD)
    assert batch.input_ids_BT.shape == batch.labels_BT.shape == batch.document_BT.shape == (count, LENGTH)
    assert {batch.input_ids_BT.dtype, batch.labels_BT.dtype, batch.document_BT.dtype} == {torch.int64}
    seen, tiles = [], []
    for ids_T, labels_T, document_T in zip(batch.input_ids_BT, batch.labels_BT, batch.document_BT, strict=True):
        numbers = [n for n in document_T.unique_consecutive().tolist() if n != PADDING]
        assert numbers == list(range(len(numbers)))  # each once, in order, padding last
        for number in numbers:
            inside = document_T == number
            sample = placed[int(ids_T[inside][0]) - 1000]
            assert ids_T[inside].tolist() == sample.ids_T.tolist()
            seen.append(sample.key)
            expected = np.where(sample.learned_T[1:], sample.ids_T[1:], IGNORED).tolist()
            assert labels_T[inside].tolist() == [*expected, IGNORED]
            tiles += [] if sample.tiles_NCHW is None else [sample.tiles_NCHW]
        assert (ids_T[document_T == PADDING] == PAD).all()
        assert (labels_T[document_T == PADDING] == IGNORED).all()
    assert sorted(seen, key=int) == [sample.key for sample in placed]
    assert (batch.input_ids_BT == PATCH).sum() == 2 * sum(map(len, tiles))
    if tiles:
        assert batch.pixels_NCHW is not None
        assert batch.pixels_NCHW.dtype == torch.float32
        assert batch.pixels_NCHW.tolist() == np.concatenate(tiles).tolist()  # in the order of their tokens
    else:
        assert batch.pixels_NCHW is None


def sample(key: str, length: int, tile: float | None = None) -> Encoded:
    tiles = None if tile is None else np.full((1, 3, 2, 2), tile, np.float32)
    return Encoded(key, np.arange(length) + 10 * int(key), np.ones(length, bool), tiles)


def test_first_fit_and_order_of_tiles() -> None:
    """The third sample goes back to the first row, and its tile before that of the second."""
    rows = Rows(2, 10)
    assert [rows.place(s) for s in (sample("1", 6, 1.0), sample("2", 7, 2.0), sample("3", 4, 3.0))] == [True] * 3
    assert not rows.place(sample("4", 4))
    batch = rows.batch(PAD)
    assert batch.document_BT.tolist() == [[0] * 6 + [1] * 4, [0] * 7 + [PADDING] * 3]
    assert batch.input_ids_BT[0, 6:].tolist() == [30, 31, 32, 33]
    assert batch.pixels_NCHW is not None
    assert batch.pixels_NCHW[:, 0, 0, 0].tolist() == [1.0, 3.0, 2.0]
    assert batch.to("cpu").labels_BT is batch.labels_BT


def test_a_sample_longer_than_a_row() -> None:
    with pytest.raises(HerdError, match="sample 1 has 11 tokens, a row has 10"):
        Rows(1, 10).place(sample("1", 11))
