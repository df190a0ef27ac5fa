"""JoinMatMuls: one product for weights with one input, the numbers stay, in memory and streamed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from herdgraph.export.passes import JoinMatMuls
from herdgraph.export.weights import writer
from herdgraph.export.weights.stream import Joined, Weight
from herdgraph.export.weights.writer import stream
from support import graphs

RANDOM = np.random.default_rng(0)
A, B, C = (RANDOM.normal(size=(4, n)).astype(np.float32) for n in (3, 5, 2))


def test_products_of_one_input_become_one() -> None:
    model = graphs.parse("""
    g (float[2, T, 4] x, float[4, 3] a, float[4, 5] b, float[4, 2] c)
        => (float[2, T, 3] u, float[2, T, 5] v, float[2, T, 2] w) {
        u = MatMul (x, a)
        v = MatMul (x, b)
        n = Neg (x)
        w = MatMul (n, c)
    }""", a=A, b=B, c=C)
    assert JoinMatMuls()(model).modified
    assert graphs.operators(model) == {"MatMul": 2, "Split": 1, "Constant": 1, "Neg": 1}
    assert set(model.graph.initializers) == {"a+b", "c"}
    x = RANDOM.normal(size=(2, 6, 4)).astype(np.float32)
    for found, expected in zip(graphs.run(model, x=x), (x @ A, x @ B, -x @ C), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_routers_and_weights_used_twice_stay_apart() -> None:
    model = graphs.parse("""
    g (float[T, 4] x, float[4, 3] router, float[4, 5] b, float[4, 2] c)
        => (float[T, 3] u, float[T, 5] v, float[T, 2] w, float[T, 5] z) {
        u = MatMul (x, router)
        v = MatMul (x, b)
        w = MatMul (x, c)
        n = Neg (x)
        z = MatMul (n, b)
    }""", router=A, b=B, c=C)
    assert not JoinMatMuls()(model).modified


class Source:
    def read(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        value = torch.from_numpy({"a": A, "b": B}[name].T)
        return value if index is None else value[index]


def test_streamed_parts_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "INLINE_BYTES", 0)
    a, b = Weight(Source(), "a", (3, 4)), Weight(Source(), "b", (5, 4))
    joined = Joined([a.transposed(), b.transposed(), ir.Tensor(C)])
    model = graphs.parse("g (float[1] x) => (float[1] y) { y = Identity (x) }")
    value = ir.Value(name="w", shape=ir.Shape((4, 10)), type=ir.TensorType(joined.dtype), const_value=joined)
    model.graph.register_initializer(value)
    np.testing.assert_array_equal(joined.numpy(), np.concatenate([A, B, C], axis=1))
    stream(model, tmp_path, "data")
    assert value.const_value is not None
    np.testing.assert_array_equal(value.const_value.numpy(), np.concatenate([A, B, C], axis=1))
