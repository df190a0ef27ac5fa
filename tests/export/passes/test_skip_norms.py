"""JoinResidualNorms: one operator for a sum and its norm, whose other readers get the sum."""

from __future__ import annotations

import numpy as np
import pytest

from herdgraph.export.passes import JoinResidualNorms
from support import graphs

GAIN = np.float32([1, 2, -1, 0.5])


def test_sums_and_their_norms_are_one_operator() -> None:
    model = graphs.parse("""
    g (float[1, T, 4] x, float[1, T, 4] y, float[4] gain) => (float[1, T, 4] normed, float[1, T, 4] doubled) {
        total = Add (x, y)
        norm = RMSNormalization <axis = -1, epsilon = 0.001> (total, gain)
        normed = Neg (norm)
        doubled = Add (total, total)
    }""", gain=GAIN)
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    random = np.random.default_rng(0)
    x = {name: random.normal(size=(1, 3, 4)).astype(np.float32) for name in "xy"}
    wanted = graphs.run(model, **x)
    assert JoinResidualNorms()(model).modified
    assert graphs.operators(model) == {"SkipSimplifiedLayerNormalization": 1, "Neg": 1, "Add": 1}
    for ours, theirs in zip(graphs.run(model, **x), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("other", ["float[4] y", "float[1, 1, 4] y"])
def test_what_is_no_sum_of_two_activations_stays(other: str) -> None:
    model = graphs.parse(f"""
    g (float[1, T, 4] x, {other}, float[4] gain) => (float[1, T, 4] z) {{
        total = Add (x, y)
        z = RMSNormalization <axis = -1> (total, gain)
    }}""", gain=GAIN)
    assert not JoinResidualNorms()(model).modified
