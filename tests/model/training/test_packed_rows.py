"""Packed rows: every document is computed as if it stood alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.operators import (
    causal_segments,
    document_lengths,
    document_positions,
    full_sequence_attention,
)
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
def test_segments_by_their_definition(row: list[int], chunk: int) -> None:
    """An id that comes back is another document."""
    document_BT = torch.tensor([row, row[::-1]])
    lengths, places = document_lengths(document_BT), document_positions(document_BT).flatten().tolist()
    starts = [t for t, place in enumerate(places) if place == 0]
    assert lengths == [end - start for start, end in itertools.pairwise([*starts, 2 * len(row)])]
    assert places == [place for length in lengths for place in range(length)]
    for t in range(1, len(row)):
        assert (places[t] == 0) == (row[t] != row[t - 1])
    assert causal_segments(lengths, chunk) == [
        len(list(same)) for _, same in itertools.groupby(
            (document, place // (chunk or 99)) for document, length in enumerate(lengths) for place in range(length))]


@pytest.mark.parametrize("chunk", [0, 3, 8])
def test_attention_by_segments_is_attention_behind_a_mask(chunk: int) -> None:
    """Outputs and gradients in float64, against the mask of every pair of tokens."""
    heads, groups, width = 4, 2, 8
    document_BT, places_BT = documents_of(ROWS), document_positions(documents_of(ROWS))
    q, k, v = (torch.randn(2, 57, n * width, dtype=torch.float64, requires_grad=True) for n in (heads, groups, groups))
    same_BTT = document_BT[:, :, None] == document_BT[:, None]
    block_BT = places_BT // (chunk or 99)
    visible_BTT = same_BTT & (block_BT[:, :, None] == block_BT[:, None]) & torch.ones(57, 57).tril().bool()
    masked = functional.scaled_dot_product_attention(
        *(x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (q, k, v)), attn_mask=visible_BTT[:, None],
        enable_gqa=True).transpose(1, 2).flatten(2)
    found = full_sequence_attention(q, k, v, num_heads=heads, kv_heads=groups, chunk=chunk,
                                    documents=document_lengths(document_BT))
    torch.testing.assert_close(found, masked)
    dy = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(y, (q, k, v), dy) for y in (found, masked)), strict=True):
        torch.testing.assert_close(ours, theirs)


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
