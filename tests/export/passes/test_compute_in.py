"""ComputeIn: what is rounded, what is not, and weights that round themselves while they are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from herdgraph.export.graph.capture import capture_vision
from herdgraph.export.passes import ComputeIn
from herdgraph.export.weights.rounded import Rounded
from herdgraph.export.weights.stream import Joined, Weight
from herdgraph.export.weights.writer import stream
from support import graphs, herds, plans

BF16, F16, F32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.FLOAT


def _types(model: ir.Model) -> dict[str, str]:
    return {value.name: value.dtype.name for value in (*model.graph.inputs, *model.graph.outputs)}


def _reads(model: ir.Model, op_type: str) -> set[ir.DataType]:
    return {node.inputs[0].dtype for node in model.graph if node.op_type == op_type}


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_types(dtype: ir.DataType) -> None:
    model = plans.twin()
    ComputeIn(dtype)(model)
    found = _types(model)
    assert {found[name] for name in ("past.0.key", "past.3.value", "new.0.key", "new.3.value")} == {dtype.name}
    assert {found[name] for name in ("logits", "image_features")} == {"FLOAT"}
    for op_type in ("RMSNormalization", "RotaryEmbedding", "TopK", "Cos", "Log"):
        assert _reads(model, op_type) == {F32}, op_type
    assert _reads(model, "Attention") == {dtype}
    products = {node.name: node.inputs[0].dtype for node in model.graph if node.op_type == "MatMul"}
    assert {name for name, found in products.items() if found == F32} == {
        f"layers.{layer}.feed_forward.router/MatMul_1" for layer in (1, 3)
    }
    weights = {name: value.const_value.dtype for name, value in model.graph.initializers.items()}
    assert weights["layers.1.feed_forward.experts.gate_up_proj"] == dtype
    assert weights["embed_tokens.weight"] == dtype
    assert weights["layers.1.feed_forward.router.weight.T"] == F32
    assert not any("/" in name.removeprefix("layers.") and name.endswith("16") for name in weights), "names are kept"
    ir.to_proto(model)


def test_vision_is_float32_outside() -> None:
    model = plans.twin(capture=capture_vision)
    ComputeIn(BF16)(model)
    assert _types(model) == {"pixel_values": "FLOAT", "image_features": "FLOAT"}
    assert _reads(model, "LayerNormalization") == _reads(model, "RotaryEmbedding") == {F32}
    assert _reads(model, "MatMul") == {BF16}


def test_numbers_in_float16() -> None:
    """ONNX Runtime runs float16 on a CPU: close to float32, and not the same."""
    model = plans.twin(herds.variant())
    inputs = {"input_ids": np.array([herds.tokens(6)]), "past_lengths": np.array([0]), "logit_rows": np.arange(6)}
    caches = {name: np.zeros((1, 2, 16, 16), np.float32) for name in _types(model) if name.startswith("past.")}
    exact = graphs.run(model, **inputs, **caches)[0]
    ComputeIn(F16)(model)
    found = graphs.run(model, **inputs, **{name: cache.astype(np.float16) for name, cache in caches.items()})[0]
    assert found.dtype == np.float32
    assert 1e-6 < np.abs(found - exact).max() < 0.03 * np.abs(exact).max()


def test_what_an_expert_multiplies_before_quantizing_stays_apart() -> None:
    model = graphs.parse("""
    moe (float[2, T, 4] x) => (float[2, T, 4] y) {
        multiplier = Constant <value = float[2, 1, 1] {4.0, 1.0}> ()
        one = Constant <value = float {0.5}> ()
        zero = Constant <value_int = 0> ()
        code = Cast <to = 17> (zero)
        multiplied = Mul (x, multiplier)
        q = QuantizeLinear (multiplied, one, code)
        y = DequantizeLinear (q, one, code)
    }""")
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
    ComputeIn(BF16)(model)
    nodes = {node.op_type: node for node in model.graph}
    assert nodes["Mul"].inputs[0].dtype == nodes["Mul"].inputs[1].dtype == F32
    assert nodes["QuantizeLinear"].inputs[0].dtype == nodes["QuantizeLinear"].inputs[1].dtype == BF16


class _Reader:
    """Counts what is read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.reads = tensor, 0

    def read(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        self.reads += 1
        return self.tensor if index is None else self.tensor[index]


@pytest.mark.parametrize("kind", ["plain", "transposed", "expert", "joined", "three-dimensional"])
def test_weights_round_while_they_are_written(kind: str, tmp_path: Path) -> None:
    values = torch.randn(3, 40, 30)
    reader = _Reader(values if kind in ("expert", "three-dimensional") else values[0])
    whole = Weight(reader, "w", (40, 30))
    source, expected = {
        "plain": (whole, values[0]), "transposed": (whole.transposed(), values[0].T),
        "expert": (Weight(reader, "w", (40, 30), expert=1), values[1]),
        "joined": (Joined([whole.transposed()] * 2), torch.cat([values[0].T] * 2, 1)),
        "three-dimensional": (Weight(reader, "w", (3, 40, 30)), values),
    }[kind]
    rounded = Rounded(source, BF16)
    assert reader.reads == 0, "nothing is read before it is written"
    value = ir.Value(name="w", shape=rounded.shape, type=ir.TensorType(BF16), const_value=rounded)
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 24}), ir_version=11)
    stream(model, tmp_path, "w.data")
    bits = np.fromfile(tmp_path / "w.data", np.int16).reshape(expected.shape)
    np.testing.assert_array_equal(bits, expected.to(torch.bfloat16).contiguous().view(torch.int16).numpy())
    np.testing.assert_array_equal(Rounded(source, BF16).numpy().view(np.int16), bits)
