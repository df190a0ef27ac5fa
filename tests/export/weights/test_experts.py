"""Experts as fused mixtures read them: what is written is what is read, one expert after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from herdgraph.export.weights.block import BlockCodes
from herdgraph.export.weights.channel import ChannelCodes
from herdgraph.export.weights.experts import Interleaved, Stacked, StackedCodes, StackedScales
from herdgraph.export.weights.rounded import Rounded
from herdgraph.export.weights.stream import Weight
from herdgraph.export.weights.writer import stream
from herdgraph.model.quantization.formats import BlockFormat

E, K, F = 3, 20, 5
VALUES = torch.randn(E, K, 2 * F, generator=torch.Generator().manual_seed(0))
BLOCKS = BlockFormat(4, 32, centered=True)


class _Reader:
    def read(self, _name: str, index: int | slice | None = None) -> torch.Tensor:
        return VALUES if index is None else VALUES[index]


def _experts() -> list[Weight]:
    whole = Weight(_Reader(), "layers.0.feed_forward.experts.gate_up_proj", (E, K, 2 * F))
    return [whole.of_expert(expert) for expert in range(E)]


def _written(directory: Path, *tensors: ir.TensorProtocol) -> list[np.ndarray]:
    values = [ir.Value(name=f"w{index}", shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype),
                       const_value=tensor) for index, tensor in enumerate(tensors)]
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 24}), ir_version=11)
    stream(model, directory, "w.data")
    return [value.const_value.numpy() for value in values if value.const_value is not None]


def _turns(rows: np.ndarray) -> np.ndarray:
    """Rows g0 g1 ... u0 u1 ... as g0 u0 g1 u1 ..."""
    return rows.reshape(2, F, -1).swapaxes(0, 1).reshape(2 * F, -1)


@pytest.mark.parametrize("rounded", [False, True])
def test_floats(rounded: bool, tmp_path: Path) -> None:
    stacked = Stacked([Interleaved(expert) for expert in _experts()])
    wanted = np.stack([_turns(expert.T.numpy()) for expert in VALUES])
    np.testing.assert_array_equal(stacked.numpy(), wanted)
    tensor = Rounded(stacked, ir.DataType.BFLOAT16) if rounded else stacked
    [found] = _written(tmp_path, tensor)
    wanted = wanted.astype(tensor.dtype.numpy())
    np.testing.assert_array_equal(found.view(np.uint8), wanted.view(np.uint8))


def test_hidden_channels_fill_blocks() -> None:
    filled = Interleaved(_experts()[0], 4)
    assert filled.shape.numpy() == (K, 16)
    rows = filled.numpy().T
    np.testing.assert_array_equal(rows[: 2 * F], _turns(VALUES[0].T.numpy()))
    assert not rows[2 * F :].any()


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_and_scales(bits: int, tmp_path: Path) -> None:
    """Of each expert what it is alone; scales are bfloat16 whatever holds them."""
    def codes(source: ir.TensorProtocol) -> BlockCodes | ChannelCodes:
        return ChannelCodes(source, centered=True) if bits == 8 else BlockCodes(source, BLOCKS)

    stacked = StackedCodes([codes(expert) for expert in _experts()])
    found, scales = _written(tmp_path, stacked, StackedScales(stacked))
    for index, source in enumerate(_experts()):
        alone = codes(source)
        own = alone.numpy().T if bits == 8 else alone.numpy().reshape(2 * F, -1)
        np.testing.assert_array_equal(found[index], own)
    assert found.shape == ((E, 2 * F, K) if bits == 8 else (E, 2 * F, 16))
    assert scales.shape == ((E, 2 * F) if bits == 8 else (E, 2 * F, 1))
    np.testing.assert_array_equal(scales, scales.astype(ir.DataType.BFLOAT16.numpy()).astype(np.float32))
