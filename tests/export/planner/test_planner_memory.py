"""What devices hold: the released models by hand, the formats by the export's own tensors, random splits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.planner.memory import Workload, caches, fullest_rank, part_of, rank_tensors, weight_total, weights
from herdgraph.export.planner.search import valid_plans
from herdgraph.export.planner.storage import Storage
from herdgraph.export.planner.traffic import cache_bytes
from herdgraph.export.weights.block import BlockCodes, BlockScales, BlockZeros
from herdgraph.export.weights.channel import ChannelCodes, ChannelScales, RowCodes, RowScales
from herdgraph.export.weights.fp8 import ChannelRatios, Fp8Codes, OutlierWeights
from herdgraph.export.weights.packed import GateUp, PackedMatrix, PackedScales
from herdgraph.export.weights.stream import Weight
from herdgraph.model.checkpoint import open_checkpoint, save_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.names import expected_tensors
from herdgraph.model.config.parameter_counts import model_size
from herdgraph.model.config.presets import BEHEMOTH, MAVERICK, SCOUT, TINY
from herdgraph.model.config.shard_plan import ShardPlan, shapes_of_rank
from herdgraph.model.quantization.formats import BlockFormat, ChannelFormat
from herdgraph.model.quantization.packed_sizes import can_pack
from herdgraph.model.quantization.recipes import RECIPES, Recipe
from herdgraph.runtimes.kv_cache.paged import CachePools
from herdgraph.runtimes.kv_cache.pool import BLOCK_TOKENS, block_bytes
from support.configs import configs

BF16, FP8, FP32 = Storage("bf16", "bf16"), Storage("fp8", "bf16"), Storage("fp32", "float32")
ONE = ShardPlan()


@pytest.mark.parametrize(("config", "billions", "gigabytes"), [(SCOUT, 108.64, 217), (MAVERICK, 401.58, 803)])
def test_released_models_in_bfloat16(config: HerdConfig, billions: float, gigabytes: float) -> None:
    """../shared/reference/llama4.md, section 1 (parameters) and its line on sizes; Maverick's files have 803 GB."""
    assert weight_total(config, BF16) == pytest.approx(2e9 * billions, rel=1e-3)
    assert weight_total(config, BF16) == pytest.approx(1e9 * gigabytes, rel=2e-3)


def test_parts_of_scout() -> None:
    """The same table: routed 96.64, shared 6.04, attention 3.02, embedding and head 2.07 B; tower 851 + 21 M."""
    parts = weights(SCOUT, ONE, BF16, 0, images=True)
    for part, billions in (("routed experts", 96.64), ("shared experts", 6.04), ("attention", 3.02),
                           ("embedding and head", 2.07), ("image tower", 0.872)):
        assert parts[part] == pytest.approx(2e9 * billions, rel=3e-3), part
    assert "dense feed-forward" not in parts
    dense = weights(MAVERICK, ONE, BF16, 0, images=False)["dense feed-forward"]
    assert dense == pytest.approx(2 * 6.04e9, rel=1e-3)


def test_one_expert_in_every_precision() -> None:
    """The line on sizes: 252 MB in bf16, 126 in fp8, 63 in int4 and more with scales (blocks of 32 here: 0.56 each)."""
    shapes = {"gate_up_proj": (1, 5120, 16384), "down_proj": (1, 8192, 5120)}
    found = {recipe: sum(Storage.on(recipe, None, cpu=False).bytes_of(f"layers.0.feed_forward.experts.{name}", shape)
                         for name, shape in shapes.items()) / 1e6 for recipe in ("bf16", "fp8", "int4")}
    assert found["bf16"] == pytest.approx(252, abs=1)
    assert found["fp8"] == pytest.approx(126, abs=1)
    assert found["int4"] == pytest.approx(125.8 * 0.5625, rel=1e-3)


@pytest.mark.parametrize(("context", "gibibytes"), [(1 << 17, 7.125), (1 << 20, 49.125), (10 << 20, 481.125)])
def test_keys_and_values_of_scout(context: int, gibibytes: float) -> None:
    """The line on KV: 48 KiB per token in global layers, and 1.125 GiB of chunks of 8192, in bf16."""
    assert cache_bytes(SCOUT.text, BF16, context) == gibibytes * 2**30
    assert sum(caches(SCOUT.text, ONE, 0, BF16, context)) == gibibytes * 2**30
    assert caches(SCOUT.text, ONE, 0, Storage("fp8", "fp8"), context)[1] == 1.125 * 2**29, "half in fp8"


@pytest.mark.parametrize(("kv", "kind"), [("float32", "float"), ("float16", "float16"), ("int8", "int8")])
@pytest.mark.parametrize("head_dim", [128, 24])
def test_caches_of_a_cpu_are_counted_as_their_blocks(kv: str, kind: str, head_dim: int) -> None:
    """Scales of 8-bit ones and what heads are filled up with included."""
    text, tokens = replace(TINY.text, head_dim=head_dim), 2 * BLOCK_TOKENS
    text = replace(text, attention_chunk_size=tokens)
    pools = CachePools.of(text, block_bytes(text.num_kv_heads, head_dim, kind), 1 << 20)
    assert cache_bytes(text, Storage.on("int8", kv, cpu=True), tokens) == 2 * (pools.whole.cost + pools.chunked.cost)


def test_a_cpu_needs_no_memory_for_scores() -> None:
    """Its attention goes block by block, over full chunks of a prompt."""
    near, far = (fullest_rank(SCOUT, ONE, Storage.on("int8", None, cpu=True), Workload(context, 1))["activations"]
                 for context in (512, 1 << 20))
    assert near == far


def test_short_contexts_do_not_fill_a_chunk() -> None:
    assert cache_bytes(SCOUT.text, BF16, 1000) == 192 * 1024 * 1000


def test_behemoth_is_what_was_announced() -> None:
    """Meta: 288 B active, almost 2 T in all, 16 experts. The rest is ours."""
    facts = model_size(BEHEMOTH)
    assert facts.total == pytest.approx(2e12, rel=0.005)
    assert facts.active == pytest.approx(288e9, rel=0.005)
    assert BEHEMOTH.text.num_experts == 16


# --- formats: the planner's bytes against the export's tensors -----------------------------------------------------

_TABLES = ("embed_tokens.weight", "vision_model.class_embedding", "vision_model.positional_embedding_vlm")


def exported_bytes(recipe: Recipe, name: str, shape: tuple[int, ...], float_bytes: int, *, packed: bool) -> float:
    """Bytes of a weight by the tensors that the export writes for it, which only need its shape."""
    layout = recipe.layout_of(name)
    if name == "embed_tokens.weight" and recipe.embedding_layout:
        rows = RowCodes(Weight(None, name, shape))  # type: ignore[arg-type]
        return rows.nbytes + RowScales(rows).nbytes
    if len(shape) == 1 or name in _TABLES:
        return (4 if len(shape) == 1 else float_bytes) * math.prod(shape)
    experts, inputs, outputs = shape if len(shape) == 3 else (1, *shape[::-1])
    source: Any = SimpleNamespace(shape=ir.Shape((inputs, outputs)), name=name, meta={})
    if packed and can_pack(layout):
        shares = ".gate_proj." in name or ".up_proj." in name
        matrix = PackedMatrix(GateUp(source, source) if shares else source, layout)
        scales = PackedScales(matrix).nbytes if isinstance(layout, ChannelFormat) else 0
        return experts * (matrix.nbytes + scales) / (2 if shares else 1)
    if layout is None:
        return (4 if "router" in name else float_bytes) * math.prod(shape)
    if isinstance(layout, BlockFormat):
        codes = BlockCodes(source, layout)
        kept = [codes, BlockScales(codes), *([BlockZeros(codes)] if layout.bits == 4 and not layout.centered else [])]
    elif isinstance(layout, ChannelFormat):
        channels = ChannelCodes(source)
        kept = [channels, ChannelScales(channels)]
    else:
        outliers = torch.arange(min(16, inputs // 8))
        eights = Fp8Codes(source, outliers_J=outliers if len(outliers) else None)
        kept = [eights, ChannelRatios(eights)]
        if len(outliers):  # in the type of what is not quantized
            kept.append(SimpleNamespace(nbytes=OutlierWeights(eights).nbytes * float_bytes // 4))
    if isinstance(layout, BlockFormat | ChannelFormat) and layout.centered:  # scales are rounded where they are written
        return experts * (kept[0].nbytes + kept[1].nbytes / 2)
    return experts * sum(tensor.nbytes for tensor in kept)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("config", [TINY, SCOUT], ids=["tiny", "scout"])
def test_every_tensor_is_counted_as_the_export_stores_it(recipe: str, config: HerdConfig) -> None:
    for cpu in (True, False):
        if cpu and recipe == "bf16":
            continue
        storage = Storage.on(recipe, None, cpu=cpu)
        stored = RECIPES[recipe] if cpu or recipe == "fp8" else RECIPES[recipe].centered()
        for name, shape in expected_tensors(config).items():
            expected = exported_bytes(stored, name, shape, storage.float_bytes, packed=cpu and recipe != "fp8")
            assert storage.bytes_of(name, shape) == expected, (name, shape)


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4"])
def test_a_real_bundle_is_as_large_as_planned(recipe: str, tmp_path: Path) -> None:
    """Tensor by tensor; the file has page boundaries between them."""
    config = HerdConfig(text=replace(TINY.text, vocab_size=2048, hidden_size=192, expert_size=416, dense_size=800))
    zeros = ((name, torch.zeros(shape)) for name, shape in expected_tensors(config).items())
    save_checkpoint(tmp_path / "checkpoint", config, zeros)
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        bundle = build_bundle(checkpoint, tmp_path / "bundle", recipe=recipe)
    model = ir.load(bundle.graph("decoder"))
    stored = sum(value.const_value.nbytes for graph in model.graphs() for value in graph.initializers.values()
                 if value.const_value is not None)
    assert stored == pytest.approx(weight_total(config, Storage.on(recipe, None, cpu=True)), rel=2e-3)


@pytest.mark.parametrize(("recipe", "kv", "cpu", "message"), [
    ("int3", None, False, "recipe is 'int3'"), ("fp8", "int4", False, "kv is 'int4'"),
    ("bf16", None, True, "target cpu has no recipe 'bf16'"), ("int8", "fp8", True, "not as fp8"),
])
def test_impossible_storage(recipe: str, kv: str | None, cpu: bool, message: str) -> None:
    with pytest.raises(HerdError, match=message):
        Storage.on(recipe, kv, cpu=cpu)


# --- random splits ---------------------------------------------------------------------------------------------------

@st.composite
def splits(draw: st.DrawFn) -> tuple[HerdConfig, ShardPlan]:
    config = draw(configs())
    return config, draw(st.sampled_from(list(valid_plans(config, 64))))


def replicated(config: HerdConfig, plan: ShardPlan) -> int:
    """Elements that are held more than once, counted anew: router, norms, KV heads, what of the vocabulary is whole."""
    text, width = config.text, plan.width
    shapes = {name: math.prod(shape) for name, shape in expected_tensors(config).items()}
    heads = max(1, width // text.num_kv_heads) - 1
    vocabulary = sum(size for name, size in shapes.items() if name.startswith(("embed_tokens", "lm_head")))
    copies = (1 if text.vocab_size % width == 0 else width) * vocabulary - vocabulary
    if text.tie_word_embeddings and plan.pipeline > 1:  # the table is the last stage's head as well
        copies += copies + vocabulary
    return copies + sum(
        size * ((width - 1) if "norm" in name or "router" in name else heads if "k_proj" in name or "v_proj" in name
                else 0)
        for name, size in shapes.items()
    )


@settings(max_examples=60, deadline=None)
@given(splits())
def test_ranks_together_hold_the_whole_and_what_is_replicated(split: tuple[HerdConfig, ShardPlan]) -> None:
    config, plan = split
    ranks = sum(sum(weights(config, plan, FP32, plan.stage_of(rank), images=rank == 0).values())
                for rank in range(plan.world))
    assert ranks == 4 * (model_size(config).total + replicated(config, plan))


@settings(max_examples=60, deadline=None)
@given(splits())
def test_a_rank_holds_what_the_plan_says_tensor_by_tensor(split: tuple[HerdConfig, ShardPlan]) -> None:
    config, plan = split
    for rank in range(plan.world):
        expected: dict[str, float] = {}
        for name, shape in shapes_of_rank(plan, config, rank).items():
            expected[part_of(name)] = expected.get(part_of(name), 0) + FP8.bytes_of(name, shape)
        found = weights(config, plan, FP8, plan.stage_of(rank), images=rank == 0)
        assert {part: size for part, size in found.items() if size} == expected


@settings(max_examples=60, deadline=None)
@given(splits(), st.integers(1, 100))
def test_keys_and_values_are_split_by_heads(split: tuple[HerdConfig, ShardPlan], context: int) -> None:
    config, plan = split
    ranks = plan.width * sum(sum(caches(config.text, plan, stage, FP32, context)) for stage in range(plan.pipeline))
    copies = max(1, plan.width // config.text.num_kv_heads)
    assert ranks == copies * cache_bytes(config.text, FP32, context)


@settings(max_examples=60, deadline=None)
@given(splits(), st.sampled_from(["tensor", "expert"]))
def test_a_wider_stage_never_holds_more_on_a_rank(split: tuple[HerdConfig, ShardPlan], axis: str) -> None:
    config, plan = split
    wider = replace(plan, **{axis: 2 * getattr(plan, axis)})
    if not wider.fits(config.text) or config.text.vocab_size % wider.width:
        return
    for stage in range(plan.pipeline):
        before, after = (sum(weights(config, each, FP8, stage, images=False).values()) for each in (plan, wider))
        assert after <= before
        assert sum(caches(config.text, wider, stage, BF16, 50)) <= sum(caches(config.text, plan, stage, BF16, 50))


def test_images_are_the_first_rank_s() -> None:
    parts = fullest_rank(SCOUT, ShardPlan(tensor=8), FP8, Workload(8192, 1))
    tower = sum(FP8.bytes_of(name, shape) for name, shape in expected_tensors(SCOUT).items()
                if part_of(name) == "image tower")
    assert parts["image tower"] == tower
    others = rank_tensors(SCOUT, ShardPlan(tensor=8), 0, images=False)
    assert not any(part_of(name) == "image tower" for name, _, _ in others)
