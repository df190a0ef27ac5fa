"""A factor near 1 is applied without leaving 16 bits, and to 16 bits it is the same factor."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from herdgraph.export.passes import ScaleByExcess
from support import graphs, rounding

TEXT = """g (bfloat16[tokens, 8] x, float[1, tokens, 1] a) => (bfloat16[tokens, 8] y, bfloat16[tokens, 8] z) {{
    one = Constant <value = float {{{base}}}> ()
    flat = Constant <value_ints = [-1]> ()
    axis = Constant <value = int64[1] {{1}}> ()
    a_T = Reshape (a, flat)
    factor_T = Add (one, a_T)
    first = Unsqueeze (factor_T, axis)
    wide = Cast <to = 1> (x)
    scaled = Mul (wide, first)
    y = Cast <to = 16> (scaled)
    second = Unsqueeze (factor_T, axis)
    again = Cast <to = 1> (y)
    twice = Mul (second, again)
    z = Cast <to = 16> (twice)
}}"""


def _graph(base: float = 1.0) -> ir.Model:
    model = graphs.parse(TEXT.format(base=base))
    for node in model.graph:
        for value in node.outputs:
            value.dtype = ir.DataType.BFLOAT16 if value.name in ("y", "z") else ir.DataType.FLOAT
    return model


def _run(model: ir.Model, x: np.ndarray, a: np.ndarray) -> np.ndarray:
    return graphs.run(rounding.emulate(model), x=x, a=a)[1]


def test_it_is_the_same_factor() -> None:
    """Nearer than the factor in bfloat16 would be, by far; and exactly x where the factor is 1."""
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 8)).astype(ml_dtypes.bfloat16).astype(np.float32)
    a = np.where(np.arange(64) < 8, 0, random.uniform(0, 0.6, 64)).astype(np.float32).reshape(1, 64, 1)
    model = _graph()
    ScaleByExcess()(model)
    assert graphs.operators(model) == {"Constant": 2, "Reshape": 2, "Cast": 1, "Mul": 2, "Add": 2}
    factor = (1 + a.reshape(-1, 1)) ** 2
    gap = np.abs(_run(model, x, a) / (x * factor) - 1)
    assert gap[:8].max() == 0
    assert gap.max() < 2**-7
    assert abs(np.mean(_run(_graph(), x, a) / (x * factor)) - np.mean(_run(model, x, a) / (x * factor))) < 2**-11


@pytest.mark.parametrize("base", [0.0, 2.0])
def test_other_factors_stay_float32(base: float) -> None:
    model = _graph(base)
    before = graphs.operators(model)
    ScaleByExcess()(model)
    assert graphs.operators(model) == before
