"""LowerRoutedExperts: the structure of the branches, and the numbers of the canonical operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdgraph.export.passes import LowerRoutedExperts
from herdgraph.model.llama4.operators import routed_experts
from support import graphs

D, F = 6, 5


def _model(experts: int, top_k: int, seed: int = 0) -> tuple[object, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    gate_up = random.normal(size=(experts, D, 2 * F)).astype(np.float32)
    down = random.normal(size=(experts, F, D)).astype(np.float32)
    model = graphs.parse(f"""
    moe (float[T, {D}] x, float[T, {experts}] logits, float[{experts}, {D}, {2 * F}] gate_up,
         float[{experts}, {F}, {D}] down) => (float[T, {D}] y) {{
        y = herdgraph.RoutedExperts <top_k = {top_k}> (x, logits, gate_up, down)
    }}""", gate_up=gate_up, down=down)
    return model, gate_up, down


def test_structure() -> None:
    model, *_ = _model(experts=16, top_k=1)
    assert LowerRoutedExperts()(model).modified
    found = graphs.operators(model)
    assert "RoutedExperts" not in found
    assert found["If"] == 4 + 16, "four groups of four experts"
    assert found["MatMul"] == 2 * 16, "no product outside of an expert's branch: nothing runs on all tokens"
    assert sum(1 for node in model.graph if node.op_type == "MatMul") == 0
    assert not model.graph.initializers, "weights live in their expert's branch"


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("experts", [2, 3, 4, 7, 16, 128])
@pytest.mark.parametrize("count", [1, 2, 33])
def test_numbers(experts: int, top_k: int, count: int) -> None:
    model, gate_up, down = _model(experts, top_k)
    random = np.random.default_rng(1)
    x = random.normal(size=(count, D)).astype(np.float32)
    logits = random.normal(size=(count, experts)).astype(np.float32)
    canonical = graphs.run(model, x=x, logits=logits)[0]
    LowerRoutedExperts()(model)
    lowered = graphs.run(model, x=x, logits=logits)[0]
    eager = routed_experts(*map(torch.from_numpy, (x, logits, gate_up, down)), top_k=top_k).numpy()
    np.testing.assert_allclose(lowered, canonical, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(eager, canonical, atol=2e-6, rtol=1e-5)


def test_one_expert() -> None:
    model, *_ = _model(experts=1, top_k=1)
    x, logits = np.ones((3, D), np.float32), np.array([[0.5], [-2.0], [0.0]], np.float32)
    canonical = graphs.run(model, x=x, logits=logits)[0]
    LowerRoutedExperts()(model)
    np.testing.assert_allclose(graphs.run(model, x=x, logits=logits)[0], canonical, atol=1e-6)


def test_input_is_scaled_not_output() -> None:
    """silu is not homogeneous: weighting the output would be another function."""
    x = torch.ones(1, 1)
    logit = torch.zeros(1, 1)  # sigmoid 0.5
    gate_up, down = torch.tensor([[[4.0, 1.0]]]), torch.ones(1, 1, 1)
    expected = torch.nn.functional.silu(torch.tensor(0.5 * 4.0)) * 0.5
    assert routed_experts(x, logit, gate_up, down, top_k=1).item() == pytest.approx(expected.item())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_any_distribution_of_tokens(assignment: list[int]) -> None:
    """Empty experts, one expert for all, ties in the order of tokens."""
    model, *_ = _MODEL
    x = np.random.default_rng(len(assignment)).normal(size=(len(assignment), D)).astype(np.float32)
    logits = np.full((len(assignment), 5), -1, np.float32)
    logits[np.arange(len(assignment)), assignment] = 1
    np.testing.assert_allclose(
        graphs.run(_LOWERED, x=x, logits=logits)[0], graphs.run(model, x=x, logits=logits)[0], atol=2e-6, rtol=1e-5
    )


_MODEL = _model(experts=5, top_k=1)
_LOWERED = _model(experts=5, top_k=1)[0]
LowerRoutedExperts()(_LOWERED)


def test_router_receives_gradients() -> None:
    x, router = torch.randn(8, D), torch.randn(D, 4, requires_grad=True)
    gate_up, down = torch.randn(4, D, 2 * F), torch.randn(4, F, D)
    routed_experts(x, x @ router, gate_up, down, top_k=1).square().sum().backward()
    assert router.grad is not None
    assert router.grad.abs().sum() > 0
