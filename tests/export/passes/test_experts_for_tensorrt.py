"""Experts for TensorRT, dense, gathered and unrolled: structure, names, and the numbers of the canonical operator."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdgraph.export.passes import (
    LowerExpertsDense,
    LowerExpertsFused,
    LowerExpertsGathered,
    LowerExpertsUnrolled,
)
from support import graphs

D, F = 6, 5
LOWERINGS = [LowerExpertsDense, LowerExpertsGathered, LowerExpertsUnrolled]
EXPERTS = "layers.1.feed_forward.experts"
NOT_IN_TENSORRT = {"If", "Loop", "NonZero", "ScatterND", "ScatterElements", "RoutedExperts"}


def _model(experts: int, top_k: int) -> ir.Model:
    random = np.random.default_rng(0)
    gate_up = random.normal(size=(experts, D, 2 * F)).astype(np.float32)
    down = random.normal(size=(experts, F, D)).astype(np.float32)
    model = graphs.parse(f"""
    moe (float[T, {D}] x, float[T, {experts}] logits, float[{experts}, {D}, {2 * F}] gate_up,
         float[{experts}, {F}, {D}] down) => (float[T, {D}] y) {{
        y = herdgraph.RoutedExperts <top_k = {top_k}> (x, logits, gate_up, down)
    }}""", gate_up=gate_up, down=down)
    node = next(iter(model.graph))
    node.name = EXPERTS
    for name in ("gate_up", "down"):
        model.graph.initializers[name].name = f"{EXPERTS}.{name}_proj"
    return model


def _inputs(experts: int, count: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    shapes = {"x": (count, D), "logits": (count, experts)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("experts", [2, 3, 16, 128])
@pytest.mark.parametrize("count", [1, 2, 33])
def test_numbers(lowering: type, experts: int, top_k: int, count: int) -> None:
    model, inputs = _model(experts, top_k), _inputs(experts, count)
    canonical = graphs.run(model, **inputs)[0]
    assert lowering()(model).modified
    np.testing.assert_allclose(graphs.run(model, **inputs)[0], canonical, atol=2e-6, rtol=1e-5)
    assert not graphs.operators(model).keys() & NOT_IN_TENSORRT


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_one_expert(lowering: type) -> None:
    model, inputs = _model(1, 1), _inputs(1, 3)
    canonical = graphs.run(model, **inputs)[0]
    lowering()(model)
    np.testing.assert_allclose(graphs.run(model, **inputs)[0], canonical, atol=1e-6)


@pytest.mark.parametrize("lowering", [LowerExpertsDense, LowerExpertsGathered])
def test_batched_weights_keep_their_names(lowering: type) -> None:
    model = _model(4, 1)
    lowering()(model)
    assert set(model.graph.initializers) == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    assert graphs.operators(model)["MatMul"] == 2


def test_unrolled_weights_are_named_by_expert() -> None:
    model = _model(4, 1)
    whole = model.graph.initializers[f"{EXPERTS}.down_proj"].const_value.numpy()
    LowerExpertsUnrolled()(model)
    assert set(model.graph.initializers) == {
        f"{EXPERTS}/expert_{expert}.{part}_proj" for expert in range(4) for part in ("gate_up", "down")
    }
    np.testing.assert_array_equal(
        model.graph.initializers[f"{EXPERTS}/expert_2.down_proj"].const_value.numpy(), whole[2]
    )
    assert graphs.operators(model)["MatMul"] == 2 * 4


"""What TensorRT documents of its layer: SwiGLU experts, their outputs multiplied by scores."""


@pytest.mark.parametrize("top_k", [1, 2])
def test_fused_scales_the_input(top_k: int) -> None:
    model, inputs = _model(4, top_k), _inputs(4, 9)
    canonical = graphs.run(model, **inputs)[0]
    assert LowerExpertsFused()(model).modified
    assert graphs.operators(model)["TRT_MoE"] == 1
    function = ir.serde.deserialize_function(onnx.parser.parse_function(graphs.TRT_MOE))
    model.functions[function.identifier()] = function
    np.testing.assert_allclose(graphs.run(model, **inputs)[0], canonical, atol=2e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_unrolled_with_any_distribution_of_tokens(assignment: list[int]) -> None:
    """Empty experts first, in between and last; one expert for all; and no product without rows."""
    count = len(assignment)
    inputs = {"x": np.random.default_rng(count).normal(size=(count, D)).astype(np.float32),
              "logits": np.full((count, 5), -1, np.float32)}
    inputs["logits"][np.arange(count), assignment] = 1
    y, *rows = graphs.run(_UNROLLED, **inputs)
    np.testing.assert_allclose(y, graphs.run(_CANONICAL, **inputs)[0], atol=2e-6, rtol=1e-5)
    assert [len(part) for part in rows] == [max(1, assignment.count(expert)) for expert in range(5)]


def _unrolled_showing_rows() -> ir.Model:
    """The lowered model, with each expert's rows as outputs."""
    model = _model(5, 1)
    LowerExpertsUnrolled()(model)
    concat = next(node for node in model.graph if node.op_type == "Concat")
    for part in concat.inputs:
        part.type, part.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((None, D))
        model.graph.outputs.append(part)
    return model


_CANONICAL, _UNROLLED = _model(5, 1), _unrolled_showing_rows()
