"""LowerProjects: one operator for norm, product and residual; numbers of the canonical graph; what is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from herdgraph.export.passes import JoinMatMuls, LowerProjects
from herdgraph.model.quantization.formats import BlockFormat, ChannelFormat
from herdgraph.model.quantization.recipes import RECIPES, Format, Recipe, Rule
from support import graphs

FP32 = RECIPES["fp32"]


def _recipe(layout: Format | None) -> Recipe:
    return Recipe("test", "", (Rule("*", layout),))


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BODIES = {
    "plain": "y = MatMul (x, w)",
    "normed": "n = RMSNormalization <axis = -1, epsilon = 0.001> (x, gain)\n y = MatMul (n, w)",
    "residual": "m = MatMul (x, w)\n y = Add (r, m)",
    "swapped": "m = MatMul (x, w)\n y = Add (m, r)",
}


def _model(body: str, inputs: int, channels: int) -> ir.Model:
    return graphs.parse(f"""
    g (float[1, T, {inputs}] x, float[1, T, {channels}] r, float[{inputs}] gain, float[{inputs}, {channels}] w)
        => (float[1, T, {channels}] y) <float[1, T, {channels}] m> {{
        {body}
    }}""", w=_random(inputs, channels), gain=_random(inputs, seed=1))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("inputs", "channels"), [(64, 32), (70, 5), (1, 1), (33, 100)])
def test_numbers(body: str, inputs: int, channels: int) -> None:
    model = _model(BODIES[body], inputs, channels)
    given = {"x": _random(1, 7, inputs, seed=2), "r": _random(1, 7, channels, seed=3)}
    wanted = graphs.run(model, **given)
    assert LowerProjects(FP32)(model).modified
    assert graphs.operators(model) == {"Project": 1}
    np.testing.assert_allclose(graphs.run(model, **given)[0], wanted[0], atol=1e-4)


TOWER = {
    "layer norm": "n = LayerNormalization <axis = -1, epsilon = 0.001> (x, gain, shift)\n y = MatMul (n, w)",
    "bias": "m = MatMul (x, w)\n y = Add (m, b)",
    "gelu": "m = MatMul (x, w)\n y = Gelu (m)",
    "bias and gelu": "m = MatMul (x, w)\n a = Add (b, m)\n y = Gelu (a)",
    "all": "n = LayerNormalization <axis = -1, epsilon = 0.001> (x, gain, shift)\n m = MatMul (n, w)\n"
           "a = Add (m, b)\n h = Gelu (a)\n y = Add (r, h)",
}


@pytest.mark.parametrize("body", TOWER)
def test_layers_of_an_image_tower(body: str) -> None:
    model = graphs.parse(f"""
    g (float[1, T, 70] x, float[1, T, 33] r, float[70] gain, float[70] shift, float[70, 33] w, float[33] b)
        => (float[1, T, 33] y) <float[1, T, 33] m, float[1, T, 33] a, float[1, T, 33] h> {{
        {TOWER[body]}
    }}""", w=_random(70, 33), gain=_random(70, seed=1), shift=_random(70, seed=4), b=_random(33, seed=5))
    given = {"x": _random(1, 7, 70, seed=2), "r": _random(1, 7, 33, seed=3)}
    wanted = graphs.run(model, **given)
    LowerProjects(FP32)(model)
    assert graphs.operators(model) == {"Project": 1}
    np.testing.assert_allclose(graphs.run(model, **given)[0], wanted[0], atol=1e-4)


def test_what_is_something_else_stays() -> None:
    """GELU by the hyperbolic tangent, and a constant that is a whole matrix."""
    model = graphs.parse("""
    g (float[3, 64] x, float[64, 32] w, float[3, 32] b) => (float[3, 32] y, float[3, 32] z) {
        m = MatMul (x, w)
        y = Gelu <approximate = "tanh"> (m)
        n = MatMul (x, w)
        z = Add (n, b)
    }""", w=_random(64, 32), b=_random(3, 32))
    given = {"x": _random(3, 64)}
    wanted = graphs.run(model, **given)
    for node in model.graph:
        node.name = node.outputs[0].name
    LowerProjects(FP32)(model)
    assert graphs.operators(model) == {"Project": 2, "Gelu": 1, "Add": 1}
    for ours, theirs in zip(graphs.run(model, **given), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_product_that_two_read_has_no_sum_of_its_own() -> None:
    read_twice = graphs.parse("""
    g (float[T, 64] x, float[64, 64] w) => (float[T, 64] y, float[T, 64] z) <float[T, 64] n> {
        n = MatMul (x, w)
        y = Add (n, x)
        z = Neg (n)
    }""", w=_random(64, 64))
    given = {"x": _random(3, 64)}
    wanted = graphs.run(read_twice, **given)
    LowerProjects(FP32)(read_twice)
    assert graphs.operators(read_twice)["Add"] == 1
    for ours, theirs in zip(graphs.run(read_twice, **given), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_norm_goes_into_every_product_that_reads_it() -> None:
    model = graphs.parse("""
    g (float[T, 64] x, float[64] gain, float[64, 32] a, float[64, 8] b) => (float[T, 32] y, float[T, 8] z) {
        n = RMSNormalization <axis = -1, epsilon = 0.001> (x, gain)
        y = MatMul (n, a)
        z = MatMul (n, b)
    }""", gain=_random(64), a=_random(64, 32), b=_random(64, 8))
    given = {"x": _random(5, 64)}
    wanted = graphs.run(model, **given)
    for node in model.graph:
        node.name = node.outputs[0].name
    LowerProjects(FP32)(model)
    assert graphs.operators(model) == {"Project": 2}
    for ours, theirs in zip(graphs.run(model, **given), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_joined_products_are_one() -> None:
    model = graphs.parse("""
    g (float[T, 64] x, float[64, 5] a, float[64, 8] b) => (float[T, 5] y, float[T, 8] z) {
        y = MatMul (x, a)
        z = MatMul (x, b)
    }""", a=_random(64, 5), b=_random(64, 8))
    given = {"x": _random(5, 64)}
    wanted = graphs.run(model, **given)
    JoinMatMuls()(model)
    LowerProjects(FP32)(model)
    assert graphs.operators(model)["Project"] == 1
    for ours, theirs in zip(graphs.run(model, **given), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(("layout", "bound"), [
    (ChannelFormat(), 0.02), (BlockFormat(8, 64), 0.02), (BlockFormat(4, 32), 0.15),
])  # fmt: skip
def test_integers_stay_near(layout: Format, bound: float) -> None:
    model = _model(BODIES["normed"], 192, 64)
    given = {"x": _random(1, 9, 192, seed=2), "r": _random(1, 9, 64, seed=3)}
    wanted = graphs.run(model, **given)[0]
    LowerProjects(_recipe(layout))(model)
    stored = ["weight.codes", "weight.scales"] if isinstance(layout, ChannelFormat) else ["weight.codes"]
    assert sorted(name.split("/")[-1] for name in model.graph.initializers) == ["gain", *stored]
    error = graphs.run(model, **given)[0] - wanted
    assert 0 < np.sqrt((error**2).mean()) < bound * wanted.std()


@pytest.mark.parametrize("layout", [BlockFormat(8, 32), BlockFormat(4, 128)])
def test_formats_that_it_has_not_are_declined(layout: Format) -> None:
    model = _model(BODIES["plain"], 64, 32)
    assert not LowerProjects(_recipe(layout))(model).modified
    assert graphs.operators(model) == {"MatMul": 1}


def test_products_of_activations_are_left_alone() -> None:
    model = graphs.parse("a (float[T, 64] x, float[64, T] k) => (float[T, T] y) { y = MatMul (x, k) }")
    assert not LowerProjects(FP32)(model).modified
