"""LowerExplicitAttention: the numbers of the canonical operator, whatever lies in the slots that hold nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from herdgraph.export.passes import LowerExplicitAttention
from support import graphs

H, G, K = 4, 2, 8


def _model(*chunks: int) -> ir.Model:
    """Layers of the given chunks, one after another, each with a cache of its own."""
    caches = ", ".join(f"float[B, {G}, S{i}, {K}] past_{i}_{part}" for i in range(len(chunks)) for part in "kv")
    outputs = ", ".join(f"float[B, {G}, S{i}, {K}] present_{i}_{part}" for i in range(len(chunks)) for part in "kv")
    body = "\n".join(
        f"y{i}, present_{i}_k, present_{i}_v = herdgraph.CachedAttention <num_heads = {H}, kv_heads = {G}, "
        f"chunk = {chunk}> ({'q' if i == 0 else f'y{i - 1}'}, k, v, past_{i}_k, past_{i}_v, past_lengths)"
        for i, chunk in enumerate(chunks)
    )
    model = graphs.parse(f"""
    attention (float[B, T, {H * K}] q, float[B, T, {G * K}] k, float[B, T, {G * K}] v, {caches}, int64[B] past_lengths)
        => (float[B, T, {H * K}] y{len(chunks) - 1}, {outputs}) {{
        {body}
    }}""")
    for value in (*model.graph.inputs, *model.graph.outputs):  # ONNX text knows no dots in names
        if str(value.name).startswith(("past_", "present_")) and value.name != "past_lengths":
            value.name = value.name.replace("_", ".")
    for layer, node in enumerate(model.graph):
        node.name = f"layers.{layer}.self_attn"
    return model


def _inputs(lengths: list[int], tokens: int, *slots: int) -> dict[str, Any]:
    random, batch = np.random.default_rng(0), len(lengths)
    shapes = {"q": (batch, tokens, H * K), "k": (batch, tokens, G * K), "v": (batch, tokens, G * K)}
    shapes |= {f"past.{i}.{part}": (batch, G, count, K) for i, count in enumerate(slots) for part in "kv"}
    inputs = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {**inputs, "past_lengths": np.array(lengths)}


@pytest.mark.parametrize(("chunk", "lengths", "tokens", "slots"), [
    (0, [0], 1, 8), (0, [0], 5, 8), (0, [3], 5, 8), (0, [7], 1, 8), (0, [2, 6, 0], 1, 8), (0, [2, 6, 0], 2, 9),
    (8, [0], 8, 8), (8, [3], 5, 8), (8, [8], 3, 8), (8, [21], 2, 8), (8, [1, 15, 16], 1, 8), (8, [4], 3, 20),
], ids=str)
def test_numbers(chunk: int, lengths: list[int], tokens: int, slots: int) -> None:
    model, inputs = _model(chunk), _inputs(lengths, tokens, slots)
    y, *presents = graphs.run(model, **inputs)
    assert LowerExplicitAttention()(model).modified
    found, *new = graphs.run(model, **inputs)
    np.testing.assert_allclose(found, y, atol=2e-6)
    for row, length in enumerate(lengths):
        first = length % chunk if chunk else length
        for ours, whole in zip(new, presents, strict=True):
            np.testing.assert_array_equal(ours[row], whole[row, :, first : first + tokens])


def test_what_lies_in_empty_slots_does_not_matter() -> None:
    model = _model(8)
    LowerExplicitAttention()(model)
    inputs = _inputs([3, 13], 2, 8)
    expected = graphs.run(model, **inputs)[0]
    for part in "kv":
        inputs[f"past.0.{part}"][0, :, 3:] = 1e3
        inputs[f"past.0.{part}"][1, :, 5:] = -1e3
    np.testing.assert_array_equal(graphs.run(model, **inputs)[0], expected)


def test_kinds_share_a_mask_and_name_their_slots() -> None:
    model = _model(8, 0, 8, 0)
    inputs = _inputs([21], 2, 8, 30, 8, 30)
    y = graphs.run(model, **inputs)[0]
    LowerExplicitAttention()(model)
    np.testing.assert_allclose(graphs.run(model, **inputs)[0], y, atol=2e-6)
    found = graphs.operators(model)
    assert (found["Attention"], found["Mod"], found["Concat"]) == (4, 1, 2 * 4 + 2)
    shapes = {value.name: [str(dim) for dim in value.shape] for value in (*model.graph.inputs, *model.graph.outputs)}
    assert [shapes[f"past.{i}.k"][2] for i in range(4)] == ["slots_local", "slots_global"] * 2
    assert shapes["new.3.v"] == ["B", str(G), "tokens", str(K)]
    assert not any("causal" in name for node in model.graph for name in node.attributes)
