"""SplitWidth: what a rank's graph has of heads, experts and vocabulary, and where ranks meet. Numbers: test_shards."""

from __future__ import annotations

import functools
from collections import Counter

import onnx_ir as ir
import pytest

from herdgraph.export.graph.capture import capture_decoder
from herdgraph.export.passes import SplitWidth
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan, shapes_of_rank
from support import herds

_captured = functools.cache(capture_decoder)


def _split(plan: ShardPlan, rank: int, config: HerdConfig = TINY) -> ir.Model:
    model = _captured(config).clone()
    SplitWidth(plan, rank, config)(model)
    return model


def _meeting(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph if node.domain == "herdgraph")


@pytest.mark.parametrize("plan", [ShardPlan(2), ShardPlan(1, 4), ShardPlan(2, 2)])
def test_two_sums_per_layer_one_for_the_embedding_one_gather(plan: ShardPlan) -> None:
    model = _split(plan, 1)
    assert _meeting(model) == {"AllReduce": 9, "AllGather": 1, "RoutedExperts": 2, "CachedAttention": 4}
    summed = [str(node.inputs[0].name) for node in model.graph if node.op_type == "AllReduce"]
    assert summed[:3] == ["embed_tokens/part", "layers.0.self_attn.o_proj/part", "layers.0.feed_forward.down_proj/part"]
    assert "layers.1.feed_forward/Add/part" in summed, "shared and routed together"
    assert all(node.attributes["width"].as_int() == plan.width for node in model.graph
               if node.op_type in ("AllReduce", "AllGather"))


def test_sizes_are_the_ranks_own() -> None:
    plan = ShardPlan(2, 2)
    model = _split(plan, 3)
    for name, shape in shapes_of_rank(plan, TINY, 3).items():
        if name in model.graph.initializers:
            assert model.graph.initializers[name].shape.numpy() == shape
    attention, experts = (next(node for node in model.graph if node.op_type == kind)
                          for kind in ("CachedAttention", "RoutedExperts"))
    assert [attention.attributes[name].as_int() for name in ("num_heads", "kv_heads")] == [1, 1]
    assert experts.attributes["first_expert"].as_int() == 2
    rotated = {node.attributes["num_heads"].as_int() for node in model.graph if node.op_type == "RotaryEmbedding"}
    assert rotated == {1}
    assert {value.shape[1] for value in (*model.graph.inputs, *model.graph.outputs) if "key" in str(value.name)} == {1}


def test_without_a_range_of_experts_all_are_there() -> None:
    experts = next(node for node in _split(ShardPlan(2), 1).graph if node.op_type == "RoutedExperts")
    assert "first_expert" not in experts.attributes


def test_a_vocabulary_that_is_no_multiple_stays_whole() -> None:
    config = herds.variant(vocab_size=511)
    model = _split(ShardPlan(2), 0, config)
    assert _meeting(model)["AllReduce"] == 8
    assert _meeting(model)["AllGather"] == 0
    assert model.graph.initializers["lm_head.weight"].shape.numpy() == (511, 64)


def test_one_rank_is_left_alone() -> None:
    assert not SplitWidth(ShardPlan(pipeline=2), 1, TINY)(_captured(TINY).clone()).modified


def test_bodies_travel_along() -> None:
    model = _split(ShardPlan(2), 0)
    assert {function.name for function in model.functions.values()} == {
        "AllReduce", "AllGather", "RoutedExperts", "CachedAttention"}
