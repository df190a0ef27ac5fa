"""Lowerings of a range of experts: the parts of all ranks add up to the whole, and what is others' costs no product."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdgraph.export.passes import (
    LowerExpertsContrib,
    LowerExpertsDense,
    LowerExpertsFused,
    LowerExpertsGathered,
    LowerExpertsUnrolled,
    LowerRoutedExperts,
)
from herdgraph.model.llama4.operators import routed_experts
from herdgraph.model.quantization.recipes import RECIPES
from support import graphs

E, D, F = 6, 6, 5
RANDOM = np.random.default_rng(0)
GATE_UP = RANDOM.normal(size=(E, D, 2 * F)).astype(np.float32)
DOWN = RANDOM.normal(size=(E, F, D)).astype(np.float32)


class Contrib(LowerExpertsContrib):
    """In floating point."""

    def __init__(self) -> None:
        super().__init__(RECIPES["bf16"])


LOWERINGS = [None, LowerRoutedExperts, LowerExpertsDense, LowerExpertsGathered, LowerExpertsUnrolled, LowerExpertsFused,
             Contrib]


def _range(first: int, count: int, top_k: int, lowering: type | None) -> ir.Model:
    weights = {"gate_up": GATE_UP[first : first + count], "down": DOWN[first : first + count]}
    model = graphs.parse(f"""
    moe (float[T, {D}] x, float[T, {E}] logits, float[{count}, {D}, {2 * F}] gate_up,
         float[{count}, {F}, {D}] down) => (float[T, {D}] y) {{
        y = herdgraph.RoutedExperts <top_k = {top_k}, first_expert = {first}> (x, logits, gate_up, down)
    }}""", **weights)
    if lowering is not None:
        lowering()(model)
    if lowering is LowerExpertsFused:
        function = ir.serde.deserialize_function(onnx.parser.parse_function(graphs.TRT_MOE))
        model.functions[function.identifier()] = function
    return model


def _whole(x: np.ndarray, logits: np.ndarray, top_k: int) -> np.ndarray:
    return _exact(x, logits, slice(0, E), top_k)


def _exact(x: np.ndarray, logits: np.ndarray, held: slice, top_k: int) -> np.ndarray:
    """In float64: float32 sums in another order would be an oracle as far off as what it judges."""
    exact = (torch.from_numpy(each).double() for each in (x, logits, GATE_UP[held], DOWN[held]))
    found: np.ndarray = routed_experts(*exact, top_k=top_k, first_expert=held.start).numpy()
    return found


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranges_add_up(lowering: type | None, top_k: int, ranks: int) -> None:
    count = E // ranks
    models = [_range(rank * count, count, top_k, lowering) for rank in range(ranks)]
    random = np.random.default_rng(1)
    for tokens in (1, 2, 33):
        x, logits = (random.normal(size=(tokens, n)).astype(np.float32) for n in (D, E))
        parts = [graphs.run(model, x=x, logits=logits)[0] for model in models]
        np.testing.assert_allclose(sum(parts), _whole(x, logits, top_k), atol=3e-6, rtol=1e-5)
        eager = [_exact(x, logits, slice(at, at + count), top_k) for at in range(0, E, count)]
        for part, own in zip(parts, eager, strict=True):
            np.testing.assert_allclose(part, own, atol=3e-6, rtol=1e-5)


_HALVES = {lowering: [_range(first, 3, 1, lowering) for first in (0, 3)]
           for lowering in (LowerRoutedExperts, LowerExpertsUnrolled)}


@pytest.mark.parametrize("lowering", _HALVES)
@settings(max_examples=20, deadline=None)
@given(assignment=st.lists(st.integers(0, E - 1), min_size=1, max_size=40))
def test_any_distribution_of_tokens(lowering: type, assignment: list[int]) -> None:
    """All on one rank, none on it, ties in the order of tokens."""
    x = np.random.default_rng(len(assignment)).normal(size=(len(assignment), D)).astype(np.float32)
    logits = np.full((len(assignment), E), -1, np.float32)
    logits[np.arange(len(assignment)), assignment] = 1
    low, high = (graphs.run(model, x=x, logits=logits)[0] for model in _HALVES[lowering])
    np.testing.assert_allclose(low + high, _whole(x, logits, 1), atol=3e-6, rtol=1e-5)
    is_low = np.asarray(assignment) < 3
    assert not low[~is_low].any()
    assert not high[is_low].any()


def test_others_tokens_cost_no_product() -> None:
    """The session's own profile: a rank that got no token runs no matrix product, and gathers no row."""
    model = _range(3, 3, 1, LowerRoutedExperts)
    x, logits = RANDOM.normal(size=(64, D)).astype(np.float32), np.tile(np.eye(E, dtype=np.float32)[0], (64, 1))
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.log_severity_level = True, 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options,
                                           providers=["CPUExecutionProvider"])
    assert not session.run(None, {"x": x, "logits": logits})[0].any()
    profile = Path(session.end_profiling())
    ran = [event["args"] for event in json.loads(profile.read_text()) if "op_name" in event.get("args", {})]
    profile.unlink()
    assert not [args for args in ran if args["op_name"] in ("MatMul", "FusedMatMul")]
    assert [args for args in ran if args["op_name"] == "If"]
