"""LowerPagedContrib: what the CUDA operator's documentation says gives what our operator gives, call after call."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from herdgraph.export.graph.builder import Builder
from herdgraph.export.passes import LowerPagedContrib
from herdgraph.runtimes.native.library import library_path
from support import contrib_attention, graphs, token_lists
from support.paged_attention import BLOCK, Layer, temperature

LENGTHS, WIDTH = [37, 5, 21], 16
F32, I32, I64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64


def _value(name: str, dtype: ir.DataType, *dims: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))


def _model(layer: Layer) -> ir.Model:
    """One layer with our operator, its rotation computed from positions as a decoder computes it."""
    kind, build = "chunked" if layer.chunk else "global", Builder("layers.0.self_attn")
    q, kv = layer.heads * WIDTH, layer.kv_heads * WIDTH
    qkv = [_value("qkv", F32, "tokens", q + 2 * kv)] if layer.packed else [
        _value(name, F32, "tokens", width) for name, width in zip("qkv", (q, kv, kv), strict=True)]
    pasts = [_value(f"past.0.{part}", ir.DataType.UINT8, f"{kind}_pool", layer.block_bytes)
             for part in ("key", "value")]
    lists = [_value("cumulative_lengths", I32, "ends"), _value("past_lengths", I32, "sequences"),
             _value(f"block_table.{kind}", I32, "sequences", "blocks")]
    positions, heat = _value("positions", F32, 1, "tokens", 1), _value("temperature", F32, "tokens")
    frequencies = build("Constant", value=ir.Tensor((100 ** -np.linspace(0, 1, WIDTH // 2)).astype(np.float32)))
    angles = build("Mul", positions, frequencies)
    tables = [build("Squeeze", build(name, angles), build.constant([0])) for name in ("Cos", "Sin")]
    outputs = build("PagedAttention", *qkv, *[None] * (3 - len(qkv)), *pasts, *lists,
                    *(tables if layer.rotated else [None, None]), heat if layer.tempered else None, outputs=3,
                    domain="herdgraph.cpu", **layer.attributes())
    names = ("y", "present.0.key", "present.0.value")
    for value, name, like in zip(outputs, names, (_value("", F32, "tokens", q), *pasts), strict=True):
        value.name, value.type, value.shape = name, like.type, like.shape
    graph = ir.Graph([*qkv, *pasts, *lists, positions, heat], outputs, nodes=build.nodes, name="layer",
                     opset_imports={"": 24, "herdgraph.cpu": 1})
    return ir.Model(graph, ir_version=11)


class _Run:
    """Calls of one model, with caches of its own."""

    def __init__(self, model: ir.Model, block: int, chunk: int) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(library_path()))
        self.session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        self.block, self.chunk = block, chunk
        self.names = {item.name for item in self.session.get_inputs()}
        most = [min(length, chunk) if chunk else length for length in LENGTHS]
        blocks = -(-max(most) // block)
        numbers = np.random.default_rng(1).permutation(len(LENGTHS) * blocks)
        self.table = numbers.reshape(len(LENGTHS), blocks).astype(np.int32)
        self.state = {str(value.name): np.full(
            (len(numbers), *(block if isinstance(dim, ir.SymbolicDim) else dim for dim in list(value.shape)[1:])),
            7, value.dtype.numpy()) for value in model.graph.inputs if str(value.name).startswith("past.0")}

    def step(self, rows: dict[str, np.ndarray], call: token_lists.Call) -> np.ndarray:
        numbers, pasts, counts = (np.array(column, np.int32) for column in zip(*call, strict=True))
        held = pasts % self.chunk if self.chunk else pasts
        fed: dict[str, Any] = {"cumulative_lengths": np.cumsum([0, *counts]).astype(np.int32), "past_lengths": pasts}
        for kind in ("global", "chunked"):
            fed |= {f"block_table.{kind}": self.table[numbers], f"past_lengths.{kind}": held,
                    f"attention_metadata.{kind}": np.array([counts.max(), (held + counts).max()], np.int32)}
        given = {name: array for name, array in (fed | rows | self.state).items() if name in self.names}
        y, *caches = self.session.run(["y", "present.0.key", "present.0.value"], given)
        self.state = dict(zip(self.state, caches, strict=True))
        return y


@pytest.mark.parametrize("layer", [
    Layer(dims=WIDTH, chunk=16), Layer(dims=WIDTH, chunk=16, packed=False), Layer(dims=WIDTH, chunk=16, norm=False),
    Layer(dims=WIDTH, chunk=16, rotated=False, norm=False), Layer(dims=WIDTH, rotated=False, norm=False, tempered=True),
    Layer(dims=WIDTH, rotated=False, norm=False, tempered=True, packed=False), Layer(dims=WIDTH),
    Layer(dims=WIDTH, packed=False, norm=False), Layer(heads=5, kv_heads=1, dims=WIDTH, chunk=5),
], ids=str)
def test_numbers(layer: Layer) -> None:
    """Ragged prompts and single tokens, chunks that begin anew, blocks in any order."""
    model = _model(layer)
    ours = _Run(model, BLOCK, layer.chunk)
    assert LowerPagedContrib("float")(model).modified
    assert graphs.operators(model)["PagedAttention"] == 1
    theirs = _Run(contrib_attention.expand(model), 4, layer.chunk)
    random, q = np.random.default_rng(0), layer.heads * WIDTH
    data = [random.normal(size=(length, q + 2 * layer.kv_heads * WIDTH)).astype(np.float32) for length in LENGTHS]
    for call in token_lists.schedule(LENGTHS, layer.chunk):
        qkv = np.concatenate([data[number][past : past + count] for number, past, count in call])
        at = np.concatenate([np.arange(past, past + count) for _, past, count in call])
        parts = dict(zip("qkv", np.split(qkv, [q, q + layer.kv_heads * WIDTH], axis=1), strict=True))
        rows = parts | {"qkv": qkv, "positions": at[None, :, None].astype(np.float32),
                        "temperature": temperature(at).astype(np.float32)}
        np.testing.assert_allclose(theirs.step(rows, call), ours.step(rows, call), atol=2e-5)


def test_layers_of_a_kind_share_inputs_and_tables() -> None:
    model = _model(Layer(dims=WIDTH, chunk=16))
    LowerPagedContrib("float")(model)
    [node] = [node for node in model.graph if node.op_type == "PagedAttention"]
    names = [str(value.name) if value is not None else "" for value in node.inputs]
    assert names == ["qkv", "", "", "past.0.key", "past.0.value", "cumulative_lengths", "past_lengths.chunked",
                     "block_table.chunked", "attention.rotation.cos.16x8", "attention.rotation.sin.16x8", "", "",
                     "attention.ones.16", "attention.ones.16", "", "", "attention_metadata.chunked"]
    assert "past_lengths" not in {value.name for value in model.graph.inputs}
    assert not {"Cos", "Sin"} & set(graphs.operators(model)), "angles of positions are nobody's any more"
