"""LowerFullAttention: the layers of an image tower become one operator, others stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from herdgraph.export.passes import JoinMatMuls, LowerFullAttention
from support import graphs

HEADS, DIMS, TOKENS = 2, 8, 5
WIDTH = HEADS * DIMS


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _model(
    rotary: str = "interleaved = 1, num_heads = 2", attention: str = "is_causal = 0", bias: str = "bq",
    before: str = "0, 2, 1, 3", after: str = "0, 2, 1, 3",
) -> ir.Model:
    x, w, b = f"N, {TOKENS}, {WIDTH}", f"{WIDTH}, {WIDTH}", WIDTH
    heads, apart = f"N, {HEADS}, {TOKENS}, {DIMS}", f"{TOKENS}, {HEADS}, {DIMS}"
    return graphs.parse(f"""
    g (float[{x}] x, float[{w}] wq, float[{w}] wk, float[{w}] wv, float[{b}] bq, float[{b}] bk, float[{b}] bv,
       float[{TOKENS}, 4] cos, float[{TOKENS}, 4] sin) => (float[{x}] y) <float[{heads}] q, float[{heads}] k> {{
        n = Shape <start = 0, end = 1> (x)
        ones = Constant <value_ints = [1, 1]> ()
        rows = Concat <axis = 0> (n, ones)
        cos_n = Expand (cos, rows)
        sin_n = Expand (sin, rows)
        apart = Constant <value_ints = [0, {apart}]> ()
        flat = Constant <value_ints = [0, {TOKENS}, {WIDTH}]> ()
        pq = MatMul (x, wq)
        pk = MatMul (x, wk)
        pv = MatMul (x, wv)
        aq = Add (pq, {bias})
        ak = Add (pk, bk)
        av = Add (pv, bv)
        rq = RotaryEmbedding <{rotary}> (aq, cos_n, sin_n)
        rk = RotaryEmbedding <{rotary}> (ak, cos_n, sin_n)
        hq = Reshape (rq, apart)
        hk = Reshape (rk, apart)
        hv = Reshape (av, apart)
        q = Transpose <perm = [{before}]> (hq)
        k = Transpose <perm = [0, 2, 1, 3]> (hk)
        v = Transpose <perm = [0, 2, 1, 3]> (hv)
        a = Attention <{attention}> (q, k, v)
        t = Transpose <perm = [{after}]> (a)
        y = Reshape (t, flat)
    }}""", **{f"w{name}": _random(WIDTH, WIDTH, seed=i) for i, name in enumerate("qkv")},
        **{f"b{name}": _random(WIDTH, seed=3 + i) for i, name in enumerate("qkv")},
        cos=np.cos(_random(TOKENS, 4, seed=7)), sin=np.sin(_random(TOKENS, 4, seed=7)))


def test_numbers() -> None:
    model, given = _model(), {"x": _random(3, TOKENS, WIDTH, seed=8)}
    wanted = graphs.run(model, **given)
    JoinMatMuls()(model)
    assert LowerFullAttention()(model).modified
    assert graphs.operators(model) == {"MatMul": 1, "Concat": 1, "Add": 1, "FullAttention": 1}
    np.testing.assert_allclose(graphs.run(model, **given)[0], wanted[0], atol=1e-5)


@pytest.mark.parametrize("changed", [
    {"rotary": "interleaved = 0, num_heads = 2"}, {"attention": "is_causal = 1"}, {"attention": "scale = 0.5"},
    {"attention": "softcap = 2.0"}, {"bias": "pk"},
    {"before": "0, 1, 2, 3"}, {"before": "0, 2, 3, 1"}, {"after": "0, 1, 2, 3"}, {"after": "1, 2, 0, 3"},
])  # fmt: skip
def test_other_attentions_stay(changed: dict[str, str]) -> None:
    model = _model(**changed)
    JoinMatMuls()(model)
    assert not LowerFullAttention()(model).modified


def test_products_that_are_not_joined_stay() -> None:
    assert not LowerFullAttention()(_model()).modified
