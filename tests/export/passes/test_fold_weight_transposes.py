"""FoldWeightTransposes: the weight is stored transposed, the numbers stay."""

from __future__ import annotations

import numpy as np

from herdgraph.export.passes import FoldWeightTransposes
from support import graphs

LINEAR = """
linear (float[T, 4] x, float[3, 4] w) => (float[T, 3] y) {
    w_t = Transpose <perm = [1, 0]> (w)
    y = MatMul (x, w_t)
}
"""

TIED = """
tied (int64[T] ids, float[3, 4] w) => (float[T, 3] y) {
    x = Gather (w, ids)
    w_t = Transpose <perm = [1, 0]> (w)
    y = MatMul (x, w_t)
}
"""

W = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def test_linear() -> None:
    model = graphs.parse(LINEAR, w=W)
    assert FoldWeightTransposes()(model).modified
    assert graphs.operators(model) == {"MatMul": 1}
    assert list(model.graph.initializers) == ["w.T"]
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(graphs.run(model, x=x)[0], x @ W.T, rtol=1e-6)


def test_gemm_of_a_linear_layer() -> None:
    model = graphs.parse("""
    linear (float[T, 4] x, float[3, 4] w) => (float[T, 3] y) { y = Gemm <transB = 1> (x, w) }
    """, w=W)
    assert FoldWeightTransposes()(model).modified
    assert graphs.operators(model) == {"MatMul": 1}
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_allclose(graphs.run(model, x=x)[0], x @ W.T, rtol=1e-5)
    kept = graphs.parse("""
    linear (float[4, T] x, float[3, 4] w) => (float[T, 3] y) { y = Gemm <transA = 1, transB = 1> (x, w) }
    """, w=W)
    assert not FoldWeightTransposes()(kept).modified


def test_tied_weight_is_kept_in_both_orders() -> None:
    model = graphs.parse(TIED, w=W)
    FoldWeightTransposes()(model)
    assert set(model.graph.initializers) == {"w", "w.T"}
    np.testing.assert_allclose(graphs.run(model, ids=np.array([2, 0]))[0], W[[2, 0]] @ W.T, rtol=1e-6)


def test_transposed_activation_is_left_alone() -> None:
    model = graphs.parse("""
    t (float[2, 3] x) => (float[3, 2] y) { y = Transpose <perm = [1, 0]> (x) }
    """)
    assert not FoldWeightTransposes()(model).modified
