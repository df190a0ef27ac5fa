"""LowerExpertsContrib: the numbers of the canonical operator and of what codes stand for, and what the file holds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from herdgraph.errors import HerdError
from herdgraph.export.passes import LowerExpertsContrib
from herdgraph.model.quantization.recipes import RECIPES, Recipe
from support import graphs, token_lists

RECIPE = {name: RECIPES[name].centered() for name in ("bf16", "int8", "int4")}
PREFIX = "layers.0.feed_forward.experts"


def _model(experts: int, top_k: int, width: int, hidden: int, recipe: Recipe | None = None) -> ir.Model:
    random = np.random.default_rng(0)
    weights = {"gate_up": random.normal(size=(experts, width, 2 * hidden)), "down": random.normal(
        size=(experts, hidden, width))}
    weights = {name: values.astype(np.float32) / 4 for name, values in weights.items()}
    if recipe is not None:
        weights = {name: token_lists.meant(f"{PREFIX}.{name}_proj", values, recipe)
                   for name, values in weights.items()}
    model = graphs.parse(f"""
    moe (float[T, {width}] x, float[T, {experts}] logits, float[{experts}, {width}, {2 * hidden}] gate_up,
         float[{experts}, {hidden}, {width}] down) => (float[T, {width}] y) {{
        y = herdgraph.RoutedExperts <top_k = {top_k}> (x, logits, gate_up, down)
    }}""", **weights)
    for name in ("gate_up", "down"):
        value = model.graph.initializers[name]
        value.name = f"{PREFIX}.{name}_proj"
        value.const_value = ir.Tensor(weights[name], name=value.name)
    return model


@pytest.mark.parametrize("recipe", RECIPE)
@pytest.mark.parametrize(("experts", "top_k", "width", "hidden"), [
    (1, 1, 32, 32), (4, 1, 64, 48), (16, 2, 32, 32), (128, 1, 32, 8), (7, 3, 64, 33),
])
def test_numbers(recipe: str, experts: int, top_k: int, width: int, hidden: int) -> None:
    """Hidden channels that fill no block of 32, and one that is no multiple of anything."""
    random = np.random.default_rng(1)
    x, logits = (random.normal(size=(33, count)).astype(np.float32) for count in (width, experts))
    [wanted] = graphs.run(_model(experts, top_k, width, hidden, RECIPE[recipe]), x=x, logits=logits)
    model = _model(experts, top_k, width, hidden)
    assert LowerExpertsContrib(RECIPE[recipe])(model).modified
    assert graphs.operators(model)["MoE" if recipe == "bf16" else "QMoE"] == 1
    [found] = graphs.run(model, x=x, logits=logits)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_near_ties_do_not_change_the_expert() -> None:
    """Logits that 16 bits cannot tell apart: the operator is told the choice, not the logits."""
    model = _model(4, 1, 32, 32)
    LowerExpertsContrib(RECIPE["bf16"])(model)
    [node] = [node for node in model.graph if node.op_type == "MoE"]
    choices = node.inputs[1]
    assert choices is not None
    table = choices.producer().inputs[0].const_value.numpy()  # type: ignore[union-attr]
    np.testing.assert_array_equal(table, np.where(np.eye(4) > 0, 0, -1e4))


def test_what_a_gpu_reads() -> None:
    """Codes by output channel, gate and up in turns, hidden channels filled up to whole blocks."""
    shapes = {}
    for recipe in ("int8", "int4"):
        model = _model(4, 1, 64, 48)
        LowerExpertsContrib(RECIPE[recipe])(model)
        [node] = [node for node in model.graph if node.op_type == "QMoE"]
        shapes[recipe] = [value.shape.numpy() for value in node.inputs[2:] if value is not None and value.shape]
    assert shapes == {"int8": [(4, 96, 64), (4, 96), (4, 64, 48), (4, 64)],
                      "int4": [(4, 128, 32), (4, 128, 2), (4, 64, 32), (4, 64, 2)]}


def test_a_width_that_has_no_blocks_is_refused() -> None:
    with pytest.raises(HerdError, match="reads 40 channels, which is no multiple of 32: store the experts in 8 bits"):
        LowerExpertsContrib(RECIPE["int4"])(_model(2, 1, 40, 32))
