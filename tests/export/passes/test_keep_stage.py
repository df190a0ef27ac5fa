"""KeepStage: stages one after the other are the whole, in any ONNX runtime; each has only what is its own."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import pytest

from herdgraph.export.graph.capture import capture_decoder
from herdgraph.export.passes import KeepStage
from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan, shapes_of_rank
from support import graphs


@functools.cache
def _captured() -> ir.Model:
    return capture_decoder(TINY)


def _stage(plan: ShardPlan, rank: int) -> ir.Model:
    model = _captured().clone()
    KeepStage(plan, rank, TINY.text.num_layers)(model)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            seed = sum(map(ord, name))
            noise = np.random.default_rng(seed).normal(size=value.shape.numpy()) / 8
            value.const_value = ir.Tensor(noise.astype(np.float32), name=name)
    return model


def _run(model: ir.Model, hidden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    random, given = np.random.default_rng(0), dict(hidden)
    given["input_ids"] = random.integers(0, 400, (1, 5))
    given["past_lengths"], given["logit_rows"] = np.asarray([3]), np.arange(5)
    given["image_features"] = np.zeros((0, 64), np.float32)
    for value in model.graph.inputs:
        if value.name.startswith("past."):
            given[value.name] = np.zeros((1, 2, 16, 16), np.float32)
    names = [value.name for value in model.graph.outputs]
    found = graphs.run(model, **{value.name: given[value.name] for value in model.graph.inputs})
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_stages_in_a_row_are_the_whole(stages: int) -> None:
    plan, hidden = ShardPlan(pipeline=stages), {}
    for rank in range(stages):
        outputs = _run(_stage(plan, rank), hidden)
        hidden = {name: value for name, value in outputs.items() if name.startswith("hidden.")}
        assert len(hidden) == (rank < stages - 1)
    np.testing.assert_allclose(outputs["logits"], _run(_stage(ShardPlan(), 0), {})["logits"], atol=1e-5)


def test_a_stage_has_what_is_its_own() -> None:
    plan = ShardPlan(pipeline=2)
    for rank in (0, 1):
        model = _stage(plan, rank)
        weights = {name for name in model.graph.initializers if name in shapes_of_rank(ShardPlan(), TINY, 0)}
        held = {name for name in shapes_of_rank(plan, TINY, rank) if "vision" not in name and "modal" not in name}
        assert weights == held
        inputs = {value.name for value in model.graph.inputs}
        assert {name for name in inputs if name.startswith("past.")} == {
            f"past.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")}, "counted from 0"
        assert ("image_features" in inputs) == (rank == 0)
        assert ("logit_rows" in inputs) == ("hidden.2" in inputs) == (rank == 1)


def test_one_stage_is_left_alone() -> None:
    assert not KeepStage(ShardPlan(2), 1, TINY.text.num_layers)(_captured().clone()).modified
