"""Plans: every byte of a model is held by the ranks that need it, and plans that cannot be are refused in one line."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdgraph.errors import HerdError
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.names import expected_tensors
from herdgraph.model.config.presets import MAVERICK, SCOUT, TINY
from herdgraph.model.config.shard_plan import ShardPlan, shapes_of_rank
from support import herds

WIDE = herds.variant(vision=True, num_heads=8, num_kv_heads=4, num_experts=8)


def test_ranks_and_stages() -> None:
    plan = ShardPlan(tensor=2, expert=3, pipeline=2)
    assert (plan.width, plan.world) == (6, 12)
    assert [plan.stage_of(rank) for rank in (0, 5, 6, 11)] == [0, 0, 1, 1]
    assert plan.group_of(8) == range(6, 12)
    assert plan.experts_of(3, 12) == range(4, 8), "rank 3 of a stage is e = 1, t = 1"
    assert [plan.layers_of(stage, 5) for stage in (0, 1)] == [range(3), range(3, 5)]


def test_kv_heads_follow_queries() -> None:
    config = herds.variant(num_heads=8, num_kv_heads=2)
    for width in (1, 2, 4, 8):
        plan = ShardPlan(tensor=width)
        for rank in range(width):
            q, k = (plan.parts(config, f"layers.0.self_attn.{role}_proj.weight", rank)[0][0] for role in "qk")
            heads = range(q.start // 16, q.stop // 16)
            assert range(k.start // 16, k.stop // 16) == range(heads[0] // 4, heads[-1] // 4 + 1)


def test_local_text() -> None:
    local = ShardPlan(tensor=4, pipeline=2).local_text(TINY.text, 7)
    assert (local.num_layers, local.num_heads, local.num_kv_heads) == (2, 1, 1)
    assert local.chunked_layers == TINY.text.chunked_layers[2:]
    assert local.moe_layers == (1,)


@st.composite
def _splits(draw: st.DrawFn) -> tuple[HerdConfig, ShardPlan]:
    plan = ShardPlan(*(draw(st.sampled_from((1, 2, 4))) for _ in range(3)))
    layers = draw(st.integers(plan.pipeline, 6))
    kv = draw(st.sampled_from((1, 2, 4, 8, 16)))
    heads = math.lcm(kv, plan.width) * draw(st.integers(1, 2))
    text = {
        "num_layers": layers, "num_heads": heads, "num_kv_heads": kv, "num_experts": 4 * draw(st.integers(1, 3)),
        "expert_size": 16 * draw(st.integers(1, 3)), "dense_size": 16 * draw(st.integers(1, 3)),
        "moe_layers": tuple(sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1)))),
        "rope_layers": (True,) * layers, "chunked_layers": (True,) * layers,
        "vocab_size": draw(st.sampled_from((511, 512))), "tie_word_embeddings": draw(st.booleans()),
    }
    return herds.variant(vision=True, **text), plan


@settings(max_examples=60, deadline=None)
@given(_splits())
def test_parts_cover_every_element(split: tuple[HerdConfig, ShardPlan]) -> None:
    """Every element is held, and only what is replicated is held twice."""
    config, plan = split
    plan.check(config)
    text = config.text
    for name, shape in expected_tensors(config).items():
        held: Counter[tuple[int, int]] = Counter()
        for rank in range(plan.world):
            parts = plan.parts(config, name, rank)
            if parts is None:
                continue
            for axis, size in enumerate(shape):
                ranges = parts.get(axis, (range(size),))
                assert all(0 <= r.start < r.stop <= size for r in ranges)
                held.update((axis, index) for r in ranges for index in r)
        ranks = [rank for rank in range(plan.world) if plan.parts(config, name, rank) is not None]
        sizes = [math.prod(shapes_of_rank(plan, config, rank)[name]) for rank in ranks]
        assert {(axis, i) for axis, size in enumerate(shape) for i in range(size)} == set(held), name
        role = name.removesuffix(".weight").rsplit(".", 1)[-1]
        copies = sum(sizes) / math.prod(shape)
        if name.startswith(("vision_model.", "multi_modal")):
            assert copies == 1
        elif role in ("k_proj", "v_proj"):
            assert copies == max(1, plan.width / text.num_kv_heads)
        elif role == "router" or role.endswith("norm"):
            assert copies == plan.width
        elif role in ("embed_tokens", "lm_head"):
            stages = 2 if role == "embed_tokens" and text.tie_word_embeddings and plan.pipeline > 1 else 1
            assert copies == stages * (1 if text.vocab_size % plan.width == 0 else plan.width)
        else:
            assert copies == 1, name


@pytest.mark.parametrize("config", [SCOUT, MAVERICK, WIDE])
@pytest.mark.parametrize("plan", [(8, 1, 1), (1, 8, 1), (2, 4, 2), (1, 1, 4), (1, 1, 1)])
def test_plans_of_released_models(config: HerdConfig, plan: tuple[int, int, int]) -> None:
    ShardPlan(*plan).check(config)


@pytest.mark.parametrize(("config", "plan", "message"), [
    (TINY, "tp=3", r"plan tp=3,ep=1,pp=1 .* 4 attention heads cannot be split over 3 ranks .* is tp=2,ep=1,pp=1$"),
    (TINY, "ep=3", r"4 experts cannot be put into 3 even ranges; .* is tp=1,ep=2,pp=1$"),
    (TINY, "tp=8", r"4 attention heads cannot be split over 8 ranks evenly; .* is tp=4,ep=1,pp=2$"),
    (TINY, "pp=5", r"4 layers are fewer than 5 stages; .* is tp=1,ep=1,pp=4$"),
    (herds.VARIANTS["dense"], "ep=2", r"the model has no experts for 2 ranges; .* is tp=2,ep=1,pp=1$"),
    (SCOUT, "tp=10", r"8 key/value heads and 10 ranks are no multiples of each other; .* is tp=8,ep=1,pp=1$"),
    (herds.variant(expert_size=50), "tp=4", r"the expert feed-forward's width of 50 cannot be split over 4 ranks"),
    (herds.variant(dense_size=98), "tp=4", r"the dense feed-forward's width of 98 cannot be split over 4 ranks"),
])
def test_check_refusals(config: HerdConfig, plan: str, message: str) -> None:
    """A refusal names both values and the nearest plan."""
    with pytest.raises(HerdError, match=message) as caught:
        ShardPlan.parse(plan).check(config)
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
def test_nearest_plan_is_valid(tensor: int, expert: int, pipeline: int) -> None:
    plan = ShardPlan(tensor, expert, pipeline)
    nearest = plan._nearest(TINY.text)
    nearest.check(TINY)
    assert nearest.world <= plan.world
    if not any(plan._problems(TINY.text)):
        assert nearest == plan


def test_parse() -> None:
    assert ShardPlan.parse("tp=2, ep=4,pp=2") == ShardPlan(2, 4, 2)
    assert ShardPlan.parse("ep=4") == ShardPlan(expert=4)
    assert ShardPlan.parse(str(ShardPlan(2, 4, 2))) == ShardPlan(2, 4, 2)
    assert ShardPlan(**ShardPlan(2, 4, 2).to_json()) == ShardPlan(2, 4, 2)


@pytest.mark.parametrize(("text", "message"), [
    ("tp=2,tp=4", "'tp=4' is there twice in the plan 'tp=2,tp=4': write it as tp=2,ep=4,pp=2"),
    ("dp=2", "'dp=2' is not understood"), ("", "'' is not understood"), ("tp=two", "'tp=two' is not"),
    ("tp=-1", "'tp=-1' is not"), ("tp=0", "tp is 0, it must be a whole number within 1 and"),
    ("pp=99999999", "pp is 99999999"), ("tp=٢", "is not understood"),
])
def test_parse_refusals(text: str, message: str) -> None:
    with pytest.raises(HerdError, match=message):
        ShardPlan.parse(text)
