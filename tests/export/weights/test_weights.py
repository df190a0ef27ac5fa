"""StreamWritable weights: the bytes in the file, block by block, and that nothing is read before it is written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from herdgraph.export.weights import stream as weights
from herdgraph.export.weights import writer
from herdgraph.export.weights.stream import Weight, expert_of, transposed
from herdgraph.export.weights.writer import stream
from support import graphs

VALUES = {
    "linear": torch.randn(37, 20).to(torch.bfloat16),
    "experts": torch.randn(3, 7, 11),
}


class Source:
    """Counts what is read."""

    def __init__(self) -> None:
        self.largest = 0
        self.reads = 0

    def read(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        value = VALUES[name] if index is None else VALUES[name][index]
        self.reads += 1
        self.largest = max(self.largest, value.numel() * 4)
        return value


def _weight(name: str, source: Source) -> Weight:
    return Weight(source, name, tuple(VALUES[name].shape))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK_BYTES", 256)
    monkeypatch.setattr(writer, "INLINE_BYTES", 0)


def _written(tensor: ir.TensorProtocol, directory: Path) -> np.ndarray:
    model = graphs.parse("g (float[1] x) => (float[1] y) { y = Identity (x) }")
    value = ir.Value(name="w", shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    stream(model, directory, "data")
    assert isinstance(value.const_value, ir.ExternalTensor)
    return value.const_value.numpy()


@pytest.mark.parametrize("turn", [False, True])
def test_linear_in_blocks(turn: bool, tmp_path: Path) -> None:
    source = Source()
    weight = _weight("linear", source)
    weight = weight.transposed() if turn else weight
    assert source.reads == 0
    expected = VALUES["linear"].float().numpy()
    np.testing.assert_array_equal(_written(weight, tmp_path), expected.T if turn else expected)
    assert source.reads == -(-37 // 3)
    assert source.largest <= 256
    np.testing.assert_array_equal(weight.numpy(), expected.T if turn else expected)


@pytest.mark.parametrize("expert", [0, 2])
def test_one_expert_is_all_that_is_read(expert: int, tmp_path: Path) -> None:
    source = Source()
    written = _written(_weight("experts", source).of_expert(expert), tmp_path)
    np.testing.assert_array_equal(written, VALUES["experts"][expert].numpy())
    assert (source.reads, source.largest) == (1, 7 * 11 * 4)


def test_a_disk_that_takes_parts_gets_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda file, data, offset: whole(file, data[:7], offset))
    np.testing.assert_array_equal(_written(_weight("linear", Source()), tmp_path), VALUES["linear"].float().numpy())


def test_helpers_work_on_ordinary_tensors() -> None:
    tensor = ir.Tensor(VALUES["experts"].numpy())
    np.testing.assert_array_equal(expert_of(tensor, 1).numpy(), VALUES["experts"][1].numpy())
    matrix = ir.Tensor(VALUES["experts"][0].numpy())
    np.testing.assert_array_equal(transposed(matrix).numpy(), VALUES["experts"][0].numpy().T)


def test_shared_weights_are_written_once_and_aligned(tmp_path: Path) -> None:
    source = Source()
    shared = _weight("linear", source)
    model = graphs.parse("g (float[1] x) => (float[1] y) { y = Identity (x) }")
    for name, tensor in (("a", shared), ("b", shared), ("c", _weight("experts", source))):
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        model.graph.register_initializer(value)
    sizes: list[int] = []
    stream(model, tmp_path, "data", sizes.append)
    offsets = [model.graph.initializers[name].const_value.offset for name in "abc"]
    assert offsets == [0, 0, 4096]
    assert sizes == [37 * 20 * 4, 3 * 7 * 11 * 4]
