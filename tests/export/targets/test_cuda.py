"""Target cuda: its float32 twins against the canonical graph, the graphs in bfloat16, and a bundle without a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from herdgraph.export.cache_type import cache_type
from herdgraph.export.graph.capture import capture_decoder, capture_vision
from herdgraph.export.passes import KeepStage, LowerPagedContrib, SplitWidth
from herdgraph.export.passes.shard.partition import partition_at_collectives
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.targets.cuda import CUDA
from herdgraph.export.targets.options import PlanOptions
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.model.quantization.recipes import RECIPES, Caches, Recipe
from support import contrib_attention, graphs, herds, rounding, token_lists

RECIPE = {name: CUDA.stored(RECIPES[name]) for name in ("bf16", "int8", "int4")}
LENGTHS = (37, 5, 21)
"""Of three sequences: chunks of 16 are crossed twice, never and once."""
BOUND = 1e-4
F32, BF16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16


class Magnitudes:
    """Answers like a calibration."""

    def required_kv_amax(self, _layer: int, observer: str = "max") -> tuple[float, float]:
        return 4.0, 5.0

    def knows_hessian(self, _name: str) -> bool:
        return False


def _twin(model: ir.Model, recipe: Recipe) -> None:
    """Up to where graphs run on a CPU."""
    for rewrite in CUDA.twin(recipe):
        rewrite(model)


def _exact(model: ir.Model, recipe: Recipe) -> None:
    """All but the rounding, with standard operators in the place of CUDA's attention."""
    _twin(model, recipe)
    LowerPagedContrib(recipe.caches, Magnitudes())(model)  # type: ignore[arg-type]
    contrib_attention.expand(model)


def _lowered(name: str = "bf16", caches: Caches = "float") -> ir.Model:
    model = token_lists.canonical(TINY)
    recipe = replace(RECIPE[name], caches=caches)
    CUDA.lower(model, recipe, PlanOptions(), Magnitudes() if caches != "float" else None)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("name", herds.VARIANTS)
def test_twins_give_the_logits_of_the_canonical_graph(name: str) -> None:
    """Ragged calls, chunk boundaries, blocks anywhere: every odd part of the herd."""
    recipe = RECIPE["bf16"]
    gap, std = token_lists.compare(herds.VARIANTS[name], partial(_twin, recipe=recipe), recipe, LENGTHS)
    assert gap < BOUND * max(1.0, std)


@pytest.mark.parametrize("recipe", ["int8", "int4"])
@pytest.mark.parametrize("name", ["moe-every-second-layer", "top-2", "1-expert", "16-experts"])
def test_twins_of_integers_give_the_logits_of_what_the_codes_stand_for(name: str, recipe: str) -> None:
    stored = RECIPE[recipe]
    gap, std = token_lists.compare(herds.VARIANTS[name], partial(_twin, recipe=stored), stored, LENGTHS)
    assert gap < BOUND * max(1.0, std)


@pytest.mark.parametrize("name", ["moe-every-second-layer", "no-qk-norm", "no-temperature", "no-chunks", "chunk-5",
                                  "rope-everywhere", "gqa-5"])
def test_the_operator_for_cuda_means_the_same(name: str) -> None:
    """Norm before rotation, rotation by the position in the chunk, lengths of chunks, several blocks in a chunk."""
    recipe = RECIPE["bf16"]
    gap, std = token_lists.compare(herds.VARIANTS[name], partial(_exact, recipe=recipe), recipe, LENGTHS, block=4)
    assert gap < BOUND * max(1.0, std)


@pytest.mark.parametrize("caches", ["int8", "fp8"])
def test_caches_in_8_bits_stay_near(caches: Caches) -> None:
    recipe = replace(RECIPE["bf16"], caches=caches)
    config = herds.VARIANTS["moe-every-second-layer"]
    gap, std = token_lists.compare(config, partial(_exact, recipe=recipe), RECIPE["bf16"], LENGTHS, block=4)
    assert 1e-3 < gap < 1.5 * std


def _rounded(model: ir.Model) -> None:
    """The whole pipeline, rounding where the GPU's kernels round."""
    CUDA.lower(model, RECIPE["bf16"], PlanOptions())
    contrib_attention.expand(rounding.emulate(model))


def test_bfloat16_stays_near() -> None:
    """No router is so undecided here that another expert is chosen: what is left is rounding."""
    config = herds.VARIANTS["moe-every-second-layer"]
    gap, std = token_lists.compare(config, _rounded, RECIPE["bf16"], LENGTHS, block=4)
    assert 0.01 * std < gap < 0.1 * std


def test_images() -> None:
    """Features take the places of image tokens in order, beside a sequence of text; the best token is told."""
    random = np.random.default_rng(3)
    ids = [[7, 8, *[TINY.image_token_id] * 4, 9], herds.tokens(5)]
    features = random.normal(size=(4, 64)).astype(np.float32)
    model = token_lists.canonical(TINY)
    _twin(model, RECIPE["bf16"])
    lists = token_lists.Lists(model, TINY, [7, 5])
    found = lists.step(ids, [(0, 0, 7), (1, 0, 5)], features)
    reference = token_lists.Reference(token_lists.canonical(TINY), TINY)
    wanted = np.concatenate([reference.logits(ids[0], features), reference.logits(ids[1], features[:0])])
    np.testing.assert_allclose(found, wanted, atol=BOUND)
    np.testing.assert_array_equal(lists.best, found.argmax(-1))


def test_the_interface() -> None:
    model = _lowered()
    found = {str(value.name): f"{value.dtype.name if value.dtype else ''}{value.shape}"
             for value in (*model.graph.inputs, *model.graph.outputs)}
    assert found == {
        "input_ids": "INT64[tokens]", "positions": "INT64[tokens]", "logit_rows": "INT64[rows]",
        "image_features": "FLOAT[image_tokens,64]", "cumulative_lengths": "INT32[sequences_plus_1]",
        "past_lengths.global": "INT32[sequences]", "block_table.global": "INT32[sequences,global_blocks]",
        "past_lengths.chunked": "INT32[sequences]", "block_table.chunked": "INT32[sequences,chunked_blocks]",
        "attention_metadata.global": "INT32[2]", "attention_metadata.chunked": "INT32[2]",
        "logits": "FLOAT[rows,512]", "best": "INT64[rows]",
        **{f"{time}.{layer}.{part}": f"BFLOAT16[{'global' if layer == 3 else 'chunked'}_pool,block_tokens,2,16]"
           for time in ("past", "present") for layer in range(4) for part in ("key", "value")},
    }


def test_nothing_is_computed_from_sizes() -> None:
    """Not on the host, between two kernels of the device."""
    operators = graphs.operators(_lowered())
    assert not {"Shape", "Range", "Expand", "Mod", "If"} & set(operators)
    assert operators["Reshape"] == 1 + 1 + 2, "of the logits' rows, the temperature and choices of experts"


def test_operators_of_a_layer() -> None:
    """Views are free on a GPU; a mixture's casts are those of the router and of the scores."""
    model = _lowered()
    free = {"Constant", "Squeeze", "Unsqueeze", "Reshape"}
    layers = {layer: Counter(node.op_type for node in model.graph if str(node.name).startswith(f"layers.{layer}")
                             and node.op_type not in free) for layer in (1, 2)}
    feed_forward = {"Split": 1, "Sigmoid": 1, "Mul": 2}
    assert layers[2] == {"SkipSimplifiedLayerNormalization": 2, "MatMul": 4, "PagedAttention": 1, **feed_forward}
    assert layers[1] == {
        "SkipSimplifiedLayerNormalization": 2, "MatMul": 5, "PagedAttention": 1, "Split": 1, "Sigmoid": 2, "Mul": 3,
        "TopK": 1, "Gather": 1, "MoE": 1, "Add": 1, "Cast": 2}


def test_types() -> None:
    """Weights and activations in bfloat16; router, scores and logits in float32."""
    model = _lowered()
    weights = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert {dtype for name, dtype in weights.items() if "router" in name or "inv_freq" in name} == {F32}
    assert {dtype for name, dtype in weights.items() if "layers." in name and "router" not in name} == {BF16}
    exact = {node.op_type for node in model.graph if node.inputs and node.inputs[0] is not None
             and node.inputs[0].dtype == F32}
    assert not {"MoE", "PagedAttention", "SkipSimplifiedLayerNormalization", "RMSNormalization"} & exact
    assert {"TopK", "ArgMax"} <= exact


@pytest.mark.parametrize(("recipe", "caches"), [
    ("bf16", "float"), ("bf16", "int8"), ("int8", "fp8"), ("int4", "float"),
])
def test_onnx_runtime_accepts_the_types(recipe: str, caches: Caches) -> None:
    """It checks types of all nodes before it looks for kernels, which it does not have for a CPU."""
    proto = ir.to_proto(_lowered(recipe, caches)).SerializeToString()
    with pytest.raises(Exception, match="Could not find an implementation"):
        onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("caches", "dtype", "scales"), [
    ("int8", ir.DataType.INT8, (4.4 / 127, 5.5 / 127)), ("fp8", ir.DataType.FLOAT8E4M3FN, (4 / 448, 5 / 448)),
])
def test_scales_of_caches(caches: Caches, dtype: ir.DataType, scales: tuple[float, float]) -> None:
    model = _lowered(caches=caches)
    assert {value.dtype for value in model.graph.inputs if str(value.name).startswith("past.")} == {dtype}
    nodes = [node for node in model.graph if node.op_type == "PagedAttention"]
    for node in nodes:
        found = [node.inputs[at].const_value.numpy() for at in (14, 15)]  # type: ignore[union-attr]
        np.testing.assert_allclose(np.concatenate(found), np.float32(scales), rtol=2**-7)
        assert [node.inputs[at].dtype for at in (14, 15)] == [F32, F32]  # type: ignore[union-attr]
        assert node.attributes["k_quant_type"].as_string() == "PER_TENSOR"


def test_the_image_tower_stays_in_floating_point() -> None:
    model = capture_vision(TINY)
    for value in model.graph.initializers.values():
        if value.const_value is None:
            value.const_value = ir.Tensor(np.zeros(value.shape.numpy(), np.float32), name=value.name)  # type: ignore[union-attr]
    CUDA.lower(model, RECIPE["int4"], PlanOptions())
    assert not {node.domain for node in model.graph} - {""}, "standard operators only"
    types = {node.inputs[0].dtype for node in model.graph if node.op_type in ("MatMul", "Attention", "Gelu",
             "LayerNormalization", "RotaryEmbedding") and node.inputs[0]}
    assert types == {BF16}
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == [F32, F32]


def test_a_bundle_is_built_without_a_gpu(tmp_path: Path) -> None:
    herds.save(TINY, tmp_path / "checkpoint")
    with open_checkpoint(tmp_path / "checkpoint") as source:
        bundle = build_bundle(source, tmp_path / "bundle", target="cuda", recipe="int8")
    manifest = bundle.manifest
    assert (manifest.target, manifest.provider, manifest.recipe) == ("cuda", "CUDAExecutionProvider", "int8")
    assert cache_type(bundle) == "bf16"
    decoder = ir.load(bundle.graph("decoder"))
    assert decoder.metadata_props["herdgraph.cache_type"] == "bfloat16"
    assert set(decoder.opset_imports) == {"", "com.microsoft"}
    codes = decoder.graph.initializers["layers.1.feed_forward.experts/down.codes"].const_value
    assert codes is not None
    assert (codes.dtype, codes.shape.numpy()) == (ir.DataType.UINT8, (4, 64, 48))


@pytest.mark.parametrize(("plan", "rank", "has_logits"), [
    (ShardPlan(2), 1, True), (ShardPlan(1, 2), 1, True), (ShardPlan(1, 1, 2), 0, False), (ShardPlan(1, 1, 2), 1, True),
], ids=str)
def test_ranks_and_stages_are_lowered(plan: ShardPlan, rank: int, has_logits: bool) -> None:
    """Whoever has the logits of the whole vocabulary says which is best; what crosses a cut has a type and a shape."""
    model = capture_decoder(TINY)
    KeepStage(plan, rank, TINY.text.num_layers)(model)
    SplitWidth(plan, rank, TINY)(model)
    for value in model.graph.initializers.values():
        if value.const_value is None:
            value.const_value = ir.Tensor(np.zeros(value.shape.numpy(), np.float32), name=value.name)  # type: ignore[union-attr]
    CUDA.lower(model, RECIPE["bf16"], PlanOptions())
    assert ("best" in {value.name for value in model.graph.outputs}) is has_logits
    assert {value.dtype for value in model.graph.inputs if str(value.name).startswith("hidden.")} <= {BF16}
    crossing = {value.dtype for part in partition_at_collectives(model) for value in part.model.graph.inputs
                if str(value.name).startswith("layers.")}
    assert crossing <= {BF16, F32}
