"""LowerPagedAttention: what goes into the operator, and the numbers of the canonical decoder in any cache type."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir
import pytest

from herdgraph.export.graph.capture import capture_decoder
from herdgraph.export.passes import JoinMatMuls, LowerPagedAttention, PackTokens
from herdgraph.model.config import HerdConfig
from herdgraph.model.quantization.recipes import Caches
from herdgraph.runtimes.kv_cache.pool import block_bytes
from support import graphs, herds

BLOCKS = 3
_captured = cache(capture_decoder)


def _bound(config: HerdConfig) -> ir.Model:
    """A canonical decoder with random weights."""
    model, random = _captured(config).clone(), np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.shape is not None
            shape = value.shape.numpy()
            noise = random.normal(size=shape) * (shape[0] ** -0.5 if len(shape) == 2 else shape[-1] ** -0.5)
            values = 1 + noise if len(shape) == 1 else noise * (8 if "embed" in name else 1)
            value.const_value = ir.Tensor(values.astype(np.float32), name=name)
    return model


def _canonical(model: ir.Model, config: HerdConfig, ids: list[int]) -> np.ndarray:
    """Logits of a prompt of one attention chunk, and zeros for caches."""
    text = config.text
    cache = np.zeros((1, text.num_kv_heads, 16, text.head_dim), np.float32)
    caches = {f"past.{layer}.{part}": cache for layer in range(text.num_layers) for part in ("key", "value")}
    return graphs.run(model, input_ids=np.array([ids]), past_lengths=np.zeros(1, np.int64),
                      logit_rows=np.arange(len(ids)), **caches)[0][0]


def _paged(model: ir.Model, config: HerdConfig, calls: list[list[int]], caches: Caches) -> np.ndarray:
    """Logits of the same prompt in several calls."""
    text = config.text
    size = block_bytes(text.num_kv_heads, text.head_dim, caches)
    state = {f"past.{layer}.{part}": np.zeros((BLOCKS, size), np.uint8)
             for layer in range(text.num_layers) for part in ("key", "value")}
    tables = {str(value.name): np.array([[2, 0]], np.int32) for value in model.graph.inputs
              if str(value.name).startswith("block_table")}
    found, past = [], 0
    for ids in calls:
        logits, *present = graphs.run(
            model, input_ids=np.array(ids), positions=np.arange(past, past + len(ids)),
            cumulative_lengths=np.array([0, len(ids)], np.int32), past_lengths=np.array([past], np.int32),
            logit_rows=np.arange(len(ids)), **tables, **state)
        names = [str(value.name) for value in model.graph.outputs[1:]]
        state = {name.replace("present", "past"): value for name, value in zip(names, present, strict=True)}
        found.append(logits)
        past += len(ids)
    return np.concatenate(found)


VARIANTS = ["moe-every-second-layer", "no-qk-norm", "nope-every-2nd", "no-temperature", "gqa-5", "no-chunks"]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_numbers(name: str, joined: bool) -> None:
    """Every layer's prologue is walked back, whether queries, keys and values are one product or three."""
    config, ids = herds.VARIANTS[name], herds.tokens(14)
    model = _bound(config)
    wanted = _canonical(model, config, ids)
    PackTokens()(model)
    if joined:
        JoinMatMuls()(model)
    LowerPagedAttention("float")(model)
    found = graphs.operators(model)
    assert found["PagedAttention"] == config.text.num_layers
    assert not {"RotaryEmbedding", "CachedAttention"} & set(found)
    np.testing.assert_allclose(_paged(model, config, [ids[:9], ids[9:10], ids[10:]], "float"), wanted, atol=1e-4)


@pytest.mark.parametrize(("caches", "bound"), [("float16", 2e-3), ("int8", 0.15)])
def test_smaller_caches_stay_near(caches: Caches, bound: float) -> None:
    config, ids = herds.VARIANTS["moe-every-second-layer"], herds.tokens(14)
    model = _bound(config)
    wanted = _canonical(model, config, ids)
    PackTokens()(model)
    LowerPagedAttention(caches)(model)
    error = _paged(model, config, [ids], caches) - wanted
    assert 0 < np.sqrt((error**2).mean()) < bound * wanted.std()


def test_what_the_operator_is_told() -> None:
    config = herds.VARIANTS["moe-every-second-layer"]
    model = _bound(config)
    PackTokens()(model)
    LowerPagedAttention("int8")(model)
    nodes = [node for node in model.graph if node.op_type == "PagedAttention"]
    assert [node.attributes["chunk"].as_int() for node in nodes] == [16, 16, 16, 0]
    assert [str(node.inputs[7].name) for node in nodes if node.inputs[7]] == [
        *["block_table.chunked"] * 3, "block_table.global"]
    given = [[str(value.name) if value else "" for value in node.inputs] + [""] for node in nodes]
    assert [bool(names[8]) for names in given] == [True, True, True, False], "rotation"
    assert [bool(names[10]) for names in given] == [False, False, False, True], "temperature"
    assert [node.attributes["norm_epsilon"].as_float() > 0 for node in nodes] == [True, True, True, False]
    assert {node.attributes["cache_type"].as_int() for node in nodes} == {2}
    past = next(value for value in model.graph.inputs if value.name == "past.3.key")
    assert (past.dtype, str(past.shape)) == (ir.DataType.UINT8, "[global_pool,2560]")
