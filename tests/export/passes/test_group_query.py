"""LowerCachedAttention: structure, and the numbers of the canonical and the eager operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from herdgraph.export.passes import LowerCachedAttention
from herdgraph.model.llama4.operators import cached_attention, full_sequence_attention
from support import graphs

H, G, K = 4, 2, 8


def _model(chunk: int, layers: int = 1) -> Any:
    body = "\n".join(
        f"y{i}, pk{i}, pv{i} = herdgraph.CachedAttention <num_heads = {H}, kv_heads = {G}, chunk = {chunk}> "
        f"({'q' if i == 0 else f'y{i - 1}'}, k, v, past_k, past_v, past_lengths)" for i in range(layers)
    )
    last = layers - 1
    return graphs.parse(f"""
    attention (float[B, T, {H * K}] q, float[B, T, {G * K}] k, float[B, T, {G * K}] v, float[B, {G}, S, {K}] past_k,
               float[B, {G}, S, {K}] past_v, int64[B] past_lengths)
        => (float[B, T, {H * K}] y{last}, float[B, {G}, S, {K}] pk{last}, float[B, {G}, S, {K}] pv{last}) {{
        {body}
    }}""")


def _inputs(lengths: list[int], tokens: int, slots: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    batch = len(lengths)
    shapes = {"q": (batch, tokens, H * K), "k": (batch, tokens, G * K), "v": (batch, tokens, G * K),
              "past_k": (batch, G, slots, K), "past_v": (batch, G, slots, K)}
    inputs = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {**inputs, "past_lengths": np.array(lengths)}


@pytest.mark.parametrize(("chunk", "lengths", "tokens", "slots"), [
    (0, [0], 1, 8), (0, [0], 5, 8), (0, [3], 5, 8), (0, [7], 1, 8), (0, [2, 6, 0], 1, 8),
    (8, [0], 8, 8), (8, [3], 5, 8), (8, [8], 3, 8), (8, [21], 2, 8), (8, [1, 15, 16], 1, 8),
], ids=str)
def test_numbers(chunk: int, lengths: list[int], tokens: int, slots: int) -> None:
    inputs, model = _inputs(lengths, tokens, slots), _model(chunk)
    canonical = graphs.run(model, **inputs)
    assert LowerCachedAttention()(model).modified
    lowered = graphs.run(model, **inputs)
    eager = cached_attention(*(torch.from_numpy(x) for x in inputs.values()), num_heads=H, chunk=chunk)
    for ours, reference, ground in zip(lowered, canonical, eager, strict=True):
        np.testing.assert_allclose(reference, ground, atol=2e-6)
        if ours.shape == reference.shape and ours.ndim == 4:
            first = [length % chunk if chunk else length for length in lengths]
            for row, start in enumerate(first):  # slots behind the new tokens hold anything
                np.testing.assert_array_equal(ours[row, :, : start + tokens], reference[row, :, : start + tokens])
        else:
            np.testing.assert_allclose(ours, reference, atol=2e-6)


def test_structure() -> None:
    model = _model(chunk=8, layers=3)
    LowerCachedAttention()(model)
    found = graphs.operators(model)
    assert found["GroupQueryAttention"] == 3
    assert found["Mod"] == 1, "lengths are computed once for all layers of a chunk size"
    assert "CachedAttention" not in found


@pytest.mark.parametrize("chunk", [0, 4, 7])
def test_a_filled_cache_equals_attention_without_one(chunk: int) -> None:
    """Pieces that end at chunk boundaries give what whole-sequence attention gives."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 19, heads * K, generator=random) for heads in (H, G, G))
    expected = full_sequence_attention(q, k, v, num_heads=H, kv_heads=G, chunk=chunk)
    past = [torch.zeros(1, G, chunk or 19, K) for _ in range(2)]
    found, start = [], 0
    for wish in (1, 2, 1, 3, 1, 4, 2, 2, 3):
        size = min(wish, chunk - start % chunk) if chunk else wish
        part = slice(start, start + size)
        y, *past = cached_attention(
            q[:, part], k[:, part], v[:, part], *past, torch.tensor([start]), num_heads=H, chunk=chunk
        )
        found.append(y)
        start += size
    torch.testing.assert_close(torch.cat(found, 1), expected[:, :start])
