"""LowerMixtures: one operator per feed-forward layer, with the numbers of the canonical graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from herdgraph.export.passes import LowerMixtures
from herdgraph.model.quantization.recipes import RECIPES, Recipe
from support import graphs

FP32, D, F, SHARED = RECIPES["fp32"], 64, 40, 48


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    scale = shape[-2] ** -0.5 if len(shape) > 1 else 1.0
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


SWIGLU = """
    gate = MatMul ({x}, feed_forward.gate_proj)
    sigmoid = Sigmoid (gate)
    silu = Mul (gate, sigmoid)
    up = MatMul ({x}, feed_forward.up_proj)
    hidden = Mul (silu, up)
    shared = MatMul (hidden, feed_forward.down_proj)
"""
WEIGHTS = {"feed_forward.gate_proj": _random(D, SHARED, seed=1), "feed_forward.up_proj": _random(D, SHARED, seed=2),
           "feed_forward.down_proj": _random(SHARED, D, seed=3), "gain": 1 + _random(D, seed=4) / 10}


def _parsed(body: str, **weights: np.ndarray) -> ir.Model:
    """A layer whose weights are named as those of a checkpoint, dots included."""
    given = {name: value for name, value in (WEIGHTS | weights).items() if name in body}
    declared = ", ".join(f"float[{', '.join(map(str, value.shape))}] {name}" for name, value in given.items())
    text = f"layer (float[1, T, {D}] x, {declared}) => (float[1, T, {D}] y) {{ {body} }}"
    spelled = {name: name.replace(".", "_") for name in given}
    for name, word in spelled.items():
        text = text.replace(name, word)
    model = graphs.parse(text, **{spelled[name]: value for name, value in given.items()})
    for name, word in spelled.items():
        value = model.graph.initializers[word]
        assert value.const_value is not None
        value.const_value.name = f"layers.0.{name}.weight"
    return model


def _dense(*, residual: bool = True) -> ir.Model:
    return _parsed("n = RMSNormalization <axis = -1, epsilon = 0.001> (x, gain)" + SWIGLU.format(x="n")
                   + ("y = Add (x, shared)" if residual else "y = Identity (shared)"))


def _mixture(experts: int, top_k: int = 1, *, first: int = 0, count: int | None = None, shared: bool = True,
             residual: bool = True) -> ir.Model:
    part = slice(first, first + (count or experts))
    weights = {"router": _random(D, experts, seed=5) * 4, "experts.gate_up": _random(experts, D, 2 * F, seed=6)[part],
               "experts.down": _random(experts, F, D, seed=7)[part]}
    attributes = f"top_k = {top_k}" + (f", first_expert = {first}" if count else "")
    body = f"""
        n = RMSNormalization <axis = -1, epsilon = 0.001> (x, gain)
        list = Constant <value_ints = [-1, {D}]> ()
        flat = Reshape (n, list)
        logits = MatMul (flat, router)
        routed = herdgraph.RoutedExperts <{attributes}> (flat, logits, experts.gate_up, experts.down)
        {SWIGLU.format(x="flat") if shared else ""}
        both = {"Add (shared, routed)" if shared else "Identity (routed)"}
        batch = Constant <value_ints = [1, -1, {D}]> ()
        back = Reshape (both, batch)
        y = {"Add (x, back)" if residual else "Identity (back)"}
    """
    if not shared:
        body = body.replace("both = Identity (routed)", "").replace("Reshape (both", "Reshape (routed")
    return _parsed(body, **weights)


def _compare(model: ir.Model, recipe: Recipe = FP32, tokens: int = 9) -> np.ndarray:
    """Lower a layer; what it then gives, and the largest difference to what it gave."""
    x = _random(1, tokens, D, seed=8) * 8
    wanted = graphs.run(model, x=x)[0]
    assert LowerMixtures(recipe)(model).modified
    assert graphs.operators(model)["Mixture"] == 1
    found = graphs.run(model, x=x)[0]
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    return found


@pytest.mark.parametrize("residual", [True, False])
def test_dense_layers(residual: bool) -> None:
    model = _dense(residual=residual)
    _compare(model)
    assert not {"Sigmoid", "MatMul", "RMSNormalization"} & set(graphs.operators(model))
    assert graphs.operators(model)["Identity"] == (not residual)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (7, 2), (16, 1), (16, 2)])
def test_mixtures(experts: int, top_k: int, tokens: int) -> None:
    model = _mixture(experts, top_k)
    _compare(model, tokens=tokens)
    assert graphs.operators(model) == {"Mixture": 1}, "norm, router and residual are inside"


def test_a_mixture_without_a_shared_expert() -> None:
    model = _mixture(4, shared=False)
    _compare(model)
    assert graphs.operators(model) == {"Mixture": 1}


@pytest.mark.parametrize(("experts", "count", "top_k"), [(4, 1, 1), (6, 3, 2), (8, 2, 2)])
def test_ranges_of_experts_add_up(experts: int, count: int, top_k: int) -> None:
    """Ranks have no residual inside, for it would be added once by each."""
    ranges = [_mixture(experts, top_k, first=first, count=count, shared=False, residual=False)
              for first in range(0, experts, count)]
    whole = _mixture(experts, top_k, shared=False, residual=False)
    np.testing.assert_allclose(sum(_compare(model) for model in ranges), _compare(whole), atol=1e-4)


def test_a_part_without_residual_keeps_its_shape() -> None:
    model = _mixture(4, residual=False)
    _compare(model)
    assert set(graphs.operators(model)) == {"Mixture", "Reshape", "Constant", "Identity"}


@pytest.mark.parametrize(("recipe", "bound"), [("int8", 0.03), ("int4", 0.2)])
@pytest.mark.parametrize("experts", [0, 4])
def test_integers_stay_near(recipe: str, bound: float, experts: int) -> None:
    """Hidden channels are rotated inside, before they are rounded: 16 of 48, 8 of 40 at a time."""
    model = _mixture(experts, residual=False) if experts else _dense(residual=False)
    x = _random(1, 9, D, seed=8) * 8
    wanted = graphs.run(model, x=x)[0]
    LowerMixtures(RECIPES[recipe])(model)
    operator = next(node for node in model.graph if node.op_type == "Mixture")
    assert operator.attributes["shared_format"].as_int() == {"int8": 1, "int4": 2}[recipe]
    assert operator.attributes["shared_hadamard"].as_int() == 16
    error = graphs.run(model, x=x)[0] - wanted
    assert 0 < np.sqrt((error**2).mean()) < bound * wanted.std()


def test_tokens_do_not_depend_on_their_company() -> None:
    model = _mixture(4, 2)
    LowerMixtures(RECIPES["int8"])(model)
    x = _random(1, 33, D, seed=8) * 8
    together = graphs.run(model, x=x)[0]
    for token in (0, 17, 32):
        np.testing.assert_array_equal(graphs.run(model, x=x[:, token : token + 1])[0], together[:, token : token + 1])


def test_what_is_no_feed_forward_is_left_alone() -> None:
    """Without a norm before it, and with another activation."""
    bare = _parsed(SWIGLU.format(x="x") + "y = Add (x, shared)")
    assert not LowerMixtures(FP32)(bare).modified
    other = _parsed(("n = RMSNormalization <axis = -1, epsilon = 0.001> (x, gain)" + SWIGLU.format(x="n")
                     + "y = Add (x, shared)").replace("Sigmoid", "Tanh"))
    assert not LowerMixtures(FP32)(other).modified
