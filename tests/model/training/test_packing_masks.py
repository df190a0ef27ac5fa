"""Packed rows: every document is computed as if it stood alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.operators import document_positions, visible_in_documents
from support import herds
from support.twins import twins

BOUND = 2e-5
ROWS = ([1, 7, 33, 12, 4], [30, 27])
"""Lengths of documents; longer and shorter than the chunks of 5 and 16 and the temperature floors of 3 and 8."""


def documents_of(rows: tuple[list[int], ...]) -> torch.Tensor:
    """Ids in no order: all that counts is where they change."""
    return torch.tensor([[7 * (len(row) - i) for i, length in enumerate(row) for _ in range(length)] for row in rows])


@torch.inference_mode()
@pytest.mark.parametrize("name", herds.VARIANTS)
def test_packed_text_is_each_document_alone(name: str) -> None:
    ours, _ = twins(herds.VARIANTS[name])
    ids_BT = torch.tensor([herds.tokens(57, seed=row) for row in range(len(ROWS))])
    packed_BTV = ours(ids_BT, document_BT=documents_of(ROWS))
    for ids_T, logits_TV, lengths in zip(ids_BT, packed_BTV, ROWS, strict=True):
        for ids, logits in zip(ids_T.split(lengths), logits_TV.split(lengths), strict=True):
            torch.testing.assert_close(logits, ours(ids[None])[0], atol=BOUND, rtol=0)
    assert (packed_BTV - ours(ids_BT))[:, -1].abs().max() > 1e-2, "the neighbours would have been seen"


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [5, 16])
def test_packed_pictures_are_each_document_alone(chunk: int) -> None:
    ours, _ = twins(herds.variant(vision=True, attention_chunk_size=chunk))
    picture = [TINY.begin_image_token_id, *[TINY.image_token_id] * 4, TINY.end_image_token_id]
    rows = [[herds.tokens(5) + picture + herds.tokens(9), herds.tokens(20)],
            [picture + herds.tokens(3), herds.tokens(3) + picture * 2 + herds.tokens(16)]]
    pixels_NCHW = torch.randn(4, 3, 28, 28)
    packed_BTV = ours(torch.tensor([[*itertools.chain(*row)] for row in rows]), pixels_NCHW,
                      documents_of(tuple([len(ids) for ids in row] for row in rows)))
    taken = 0
    for row, logits_TV in zip(rows, packed_BTV, strict=True):
        for ids, logits in zip(row, logits_TV.split([len(ids) for ids in row]), strict=True):
            tiles = ids.count(TINY.begin_image_token_id)
            alone = ours(torch.tensor([ids]), pixels_NCHW[taken : taken + tiles])
            torch.testing.assert_close(logits, alone[0], atol=BOUND, rtol=0)
            taken += tiles
    assert taken == 4


@torch.inference_mode()
def test_one_document_per_row_changes_nothing() -> None:
    ours, _ = twins(herds.VARIANTS["chunk-5"])
    ids_BT = torch.tensor([herds.tokens(40), herds.tokens(40, seed=1)])
    assert torch.equal(ours(ids_BT, document_BT=torch.full_like(ids_BT, 3)), ours(ids_BT))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=24), st.integers(0, 5))
def test_masks_by_their_definition(row: list[int], chunk: int) -> None:
    """An id that comes back is another document."""
    place_BT = document_positions(torch.tensor([row]))
    visible_TT = visible_in_documents(place_BT, chunk)[0, 0]
    starts = [0]
    for t in range(1, len(row)):
        starts.append(starts[-1] if row[t] == row[t - 1] else t)
    assert place_BT[0].tolist() == [t - start for t, start in enumerate(starts)]
    for t in range(len(row)):
        for s in range(len(row)):
            same_chunk = not chunk or (t - starts[t]) // chunk == (s - starts[s]) // chunk
            assert bool(visible_TT[t, s]) == (s <= t and starts[s] == starts[t] and same_chunk)


def test_gradients_stay_inside_of_a_document() -> None:
    ours, _ = twins(herds.VARIANTS["no-chunks"])
    ids_BT = torch.arange(10, 30)[None]
    ours(ids_BT, document_BT=documents_of(([8, 12],)))[0, 8:].sum().backward()
    touched = ours.decoder.embed_tokens.weight.grad.abs().sum(1).nonzero().flatten()
    assert touched.tolist() == list(range(18, 30))


def test_documents_and_a_cache_exclude_each_other() -> None:
    ours, _ = twins(herds.VARIANTS["dense"])
    with pytest.raises(AssertionError, match="one document per row"):
        ours.decoder(torch.zeros(1, 2, dtype=torch.int64), caches=[], document_BT=torch.zeros(1, 2, dtype=torch.int64))
