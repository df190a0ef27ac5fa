"""WeightsAsInputs: the same numbers with weights given, FP8 products that stay, and one plan for two layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from herdgraph.export.passes import LowerExpertsDense, LowerExpertsGathered, LowerExpertsUnrolled
from herdgraph.export.targets.tensorrt.builder import build_plan
from herdgraph.export.targets.tensorrt.weights_as_inputs import WeightsAsInputs
from support import graphs, herds, plans

CONFIG = herds.variant(num_layers=1, moe_layers=(0,), rope_layers=(True,), chunked_layers=(True,))
INPUTS = {"input_ids": np.array([herds.tokens(6)]), "past_lengths": np.array([3]), "logit_rows": np.arange(6)}
CACHES = {f"past.0.{part}": np.ones((1, 2, 16, 16), np.float32) for part in ("key", "value")}


def _run(model: ir.Model, weights: dict[str, ir.TensorProtocol]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    io = session.io_binding()
    for name, array in (INPUTS | CACHES).items():
        io.bind_cpu_input(name, array)
    for name, tensor in weights.items():
        array, value = np.ascontiguousarray(tensor.numpy()), onnxruntime.OrtValue
        if tensor.dtype == ir.DataType.FLOAT8E4M3FN:
            codes = value.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), onnx.TensorProto.FLOAT8E4M3FN)
            io.bind_ortvalue_input(name, codes)
        else:
            io.bind_cpu_input(name, array)
    io.bind_output("logits")
    session.run_with_iobinding(io)
    return io.get_outputs()[0].numpy()


@pytest.mark.parametrize("experts", [LowerExpertsDense, LowerExpertsGathered, LowerExpertsUnrolled])
def test_numbers(experts: type) -> None:
    model = plans.twin(CONFIG, experts, fp8=True)
    exact = _run(model, {})
    free = WeightsAsInputs()
    assert free(model).modified
    assert set(free.weights) == {value.name for value in model.graph.inputs} - INPUTS.keys() - CACHES.keys()
    # x · (1 / s) is not rounded like x / s: a few inputs fall on the other side of a code's boundary.
    assert np.abs(_run(model, free.weights) - exact).mean() < 0.02 * np.abs(exact).mean()
    assert set(model.graph.initializers) & {"embed_tokens.weight", "lm_head.weight.T"}
    assert not any("layers.0" in name and "ones" not in name for name in model.graph.initializers)


@pytest.mark.parametrize("experts", [LowerExpertsDense, LowerExpertsUnrolled])
def test_one_small_plan_in_which_products_stay_fp8(experts: type, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    wide = herds.variant(num_layers=1, moe_layers=(0,), rope_layers=(True,), chunked_layers=(True,), hidden_size=512,
                         num_heads=4, head_dim=128, expert_size=4096)
    model = plans.twin(wide, experts, fp8=True)
    free = WeightsAsInputs()
    free(model)
    weights = sum(tensor.nbytes for tensor in free.weights.values())
    onnx_path = plans.saved(model, tmp_path)
    check = build_plan(onnx_path, tmp_path / "p.plan", profiles=(plans.DECODE,))
    assert check.fp8 == check.intended == 2 + 2 + (2 if experts is LowerExpertsDense else 8)
    assert check.plan.bytes < 9_000_000
    assert weights > 25_000_000
    assert "fp8_e4m3" not in check.plan.constant_bytes()
    codes = [value for name, value in check.plan.inputs.items() if name.endswith(".codes")]
    assert {tensor.dtype for tensor in codes} == {"fp8_e4m3"}


def test_graphs_of_two_layers_are_one() -> None:
    """What differs between layers is all outside."""
    found = []
    for seed in (0, 1):
        model = plans.twin(CONFIG, fp8=True, seed=seed)
        WeightsAsInputs()(model)
        for name in ("embed_tokens.weight", "lm_head.weight.T"):
            model.graph.initializers[name].const_value = ir.tensor(np.zeros(1, np.float32), name=name)
        found.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert found[0] == found[1]
    assert graphs.operators(model)["QuantizeLinear"] == 6
