"""Caches in E4M3: the codes leave and enter the graph, and attention sees what they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto

from herdgraph.errors import HerdError
from herdgraph.export.passes import QuantizeCachesFp8
from herdgraph.model.config.presets import TINY
from herdgraph.model.quantization.calibration_file import CalibrationFile
from support import plans

CONFIG = TINY.text


def run(model: ir.Model, pasts: dict[str, np.ndarray], *, fp8: bool) -> dict[str, np.ndarray]:
    """One call of three tokens on a past of five; FP8 codes come and go as uint8."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options,
                                           providers=["CPUExecutionProvider"])
    value = onnxruntime.OrtValue
    given = {"input_ids": np.array([[5, 6, 7]]), "past_lengths": np.array([5]), "logit_rows": np.array([0, 1, 2]),
             "image_features": np.zeros((0, CONFIG.hidden_size), np.float32)}
    binding = session.io_binding()
    for name, array in given.items():
        binding.bind_ortvalue_input(name, value.ortvalue_from_numpy(array))
    for name, array in pasts.items():
        made = value.ortvalue_from_numpy_with_onnx_type(array, TensorProto.FLOAT8E4M3FN) if fp8 else (
            value.ortvalue_from_numpy(array))
        binding.bind_ortvalue_input(name, made)
    names = [item.name for item in session.get_outputs()]
    for item in session.get_outputs():
        if item.type == "tensor(float8e4m3fn)":
            codes = np.zeros((1, CONFIG.num_kv_heads, 3, CONFIG.head_dim), np.uint8)
            binding.bind_ortvalue_output(item.name, value.ortvalue_from_numpy_with_onnx_type(
                codes, TensorProto.FLOAT8E4M3FN))
        else:
            binding.bind_output(item.name)
    session.run_with_iobinding(binding)
    return {name: out.numpy() for name, out in zip(names, binding.get_outputs(), strict=True) if "logits" in name}


def pasts(dtype: type) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (1, CONFIG.num_kv_heads, 16, CONFIG.head_dim)
    return {f"past.{layer}.{part}": random.integers(0, 0x70, shape).astype(np.uint8).astype(dtype)
            for layer in range(CONFIG.num_layers) for part in ("key", "value")}


def test_attention_sees_what_the_codes_stand_for() -> None:
    import ml_dtypes

    exact, coded = plans.twin(), plans.twin(fp8_caches=True)
    codes = pasts(np.uint8)
    # The bfloat16 numbers next above 8 / 448 and 6 / 448.
    scales = {"key": np.float32(np.ceil(8 / 448 * 2**13) / 2**13),
              "value": np.float32(np.ceil(6 / 448 * 2**14) / 2**14)}
    values = {name: array.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales[name.split(".")[2]]
              for name, array in codes.items()}
    found, wanted = run(coded, codes, fp8=True)["logits"], run(exact, values, fp8=False)["logits"]
    assert np.abs(found - wanted).mean() < 0.05 * wanted.std(), "only the new tokens are rounded"
    assert np.abs(found - wanted).max() > 0


def test_types_of_inputs_and_outputs() -> None:
    model = plans.twin(fp8_caches=True)
    caches = [value for value in (*model.graph.inputs, *model.graph.outputs)
              if str(value.name).startswith(("past.", "new."))]
    assert len(caches) == 4 * CONFIG.num_layers
    assert {value.dtype for value in caches} == {ir.DataType.FLOAT8E4M3FN}
    assert len({str(value.name) for value in model.graph.outputs}) == 1 + 2 * CONFIG.num_layers


def test_caches_that_were_not_measured_are_refused() -> None:
    with pytest.raises(HerdError, match="calib has no magnitudes of keys and values"):
        QuantizeCachesFp8(CalibrationFile(Path("calib"), {}, "max"))(plans.twin())
