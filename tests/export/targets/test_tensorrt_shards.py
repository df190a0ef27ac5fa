"""Plans of several ranks: one for each, with the collectives inside, found in what TensorRT compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from herdgraph.calibration.calibrate import calibrate
from herdgraph.calibration.windows import Data, Window
from herdgraph.errors import HerdError
from herdgraph.export.passes import LowerCollectives
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.targets.options import PlanOptions
from herdgraph.export.targets.tensorrt import Plan
from herdgraph.export.targets.tensorrt import check as check_module
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.model.llama4.operators import OPSET
from herdgraph.runtimes.bundle.manifest import Bundle
from support import graphs, herds

CONFIG = herds.variant(num_layers=2, num_heads=8, num_kv_heads=4, moe_layers=(1,), rope_layers=(True, False),
                       chunked_layers=(True, False))
"""TensorRT-RTX has no attention kernel for fewer than four heads: each rank has four."""
OPTIONS = PlanOptions(context=256, batch=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards") / "checkpoint"
    herds.save(CONFIG, directory)
    return directory


def _build(checkpoint: Path, output: Path, plan: str) -> Bundle:
    pytest.importorskip("tensorrt_rtx")
    with open_checkpoint(checkpoint) as source:
        return build_bundle(source, output, target="tensorrt-rtx", recipe="bf16", options=OPTIONS,
                            shards=ShardPlan.parse(plan))


@pytest.mark.parametrize("plan", ["tp=2", "ep=2"])
def test_each_rank_has_a_plan_with_its_collectives(checkpoint: Path, tmp_path: Path, plan: str) -> None:
    bundle = _build(checkpoint, tmp_path / "b", plan)
    assert bundle.manifest.shards is not None
    for rank, entry in enumerate(bundle.manifest.shards.ranks):
        (partition,) = entry.partitions
        assert (partition.graph, partition.before, partition.after) == (f"rank{rank}/decoder.plan", (), ())
        assert bundle.manifest.plans[f"rank{rank}/decoder"]["collectives"] == 6
        read = Plan.read(bundle.directory / partition.graph)
        for profile in read.profiles:
            met = read.meeting(profile)
            assert len(met) == 6, "the embedding, two per layer, the logits"
            assert sum("o_proj" in name for name in met) == sum("feed_forward" in name for name in met) == 2
        caches = {tensor.dims[1] for name, tensor in read.inputs.items() if name.startswith("past.")}
        assert caches == {"2"}, "two of four key/value heads"
        assert read.targets == ("89", "120")


def test_fp8_products_of_a_range_of_experts(checkpoint: Path, tmp_path: Path) -> None:
    """Each rank has its own experts' input multipliers; what TensorRT compiled is what was meant, on every rank."""
    pytest.importorskip("tensorrt_rtx")
    data = Data([Window(herds.tokens(40, seed)) for seed in range(2)], [])
    with open_checkpoint(checkpoint) as source:
        calibrate(source, tmp_path / "calibration", data)
        bundle = build_bundle(source, tmp_path / "b", target="tensorrt-rtx", recipe="fp8", options=OPTIONS,
                              calibration=tmp_path / "calibration", shards=ShardPlan(expert=2))
    for plan in bundle.manifest.plans.values():
        assert plan["fp8_products"] == plan["fp8_intended"] > 0
        assert plan["collectives"] == 6


def test_stages_hand_over_hidden_states(checkpoint: Path, tmp_path: Path) -> None:
    bundle = _build(checkpoint, tmp_path / "b", "pp=2")
    assert bundle.manifest.shards is not None
    first, last = (entry.partitions[0] for entry in bundle.manifest.shards.ranks)
    assert [(e.op, e.value) for e in (*first.after, *last.before)] == [("send", "hidden.1"), ("recv", "hidden.1")]
    plans = [Plan.read(bundle.directory / partition.graph) for partition in (first, last)]
    assert plans[0].outputs["hidden.1"].dtype == plans[1].inputs["hidden.1"].dtype == "bf16"
    assert "logits" in plans[1].outputs
    assert "logits" not in plans[0].outputs
    assert not any(plan.meeting(0) for plan in plans)


def test_a_plan_without_the_models_collectives_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module.Plan, "meeting", lambda *_: ())
    with pytest.raises(HerdError, match=r"decoder.*AllReduce.*, in which ranks meet, is not in the plan") as caught:
        _build(checkpoint, tmp_path / "b", "tp=2")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists()


DIST_COLLECTIVE = f"""
<opset_import: ["" : {OPSET}], domain: "trt">
DistCollective <collective_operation, reduce_op, root, group_size, groups, nb_rank> (x) => (y) {{
    y = Concat <axis = 0> (x, x)
}}
"""
"""What TensorRT gathers of two equal ranks: parts along the first axis."""


def test_gathered_parts_lie_side_by_side() -> None:
    model = graphs.parse("""
    g (float[B, R, 3] x) => (float[B, R, 6] y) {
        y = herdgraph.AllGather <axis = -1, width = 2> (x)
    }""")
    model.graph.outputs[0].shape = ir.Shape(("B", "R", 6))
    assert LowerCollectives()(model).modified
    function = ir.serde.deserialize_function(onnx.parser.parse_function(DIST_COLLECTIVE))
    model.functions[function.identifier()] = function
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    np.testing.assert_array_equal(graphs.run(model, x=x)[0], np.concatenate((x, x), axis=-1))


def test_one_rank_alone() -> None:
    """The operators' bodies: what several ranks would share, one has."""
    model = graphs.parse("""
    g (float[2, 3] x) => (float[2, 3] y) {
        a = herdgraph.Recv (x)
        b = herdgraph.AllReduce <width = 1> (a)
        c = herdgraph.AllGather <axis = -1, width = 1> (b)
        y = herdgraph.Send (c)
    }""")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(graphs.run(model, x=x)[0], x)
