"""Initializers are written side by side: the same bytes on any number of cores, and errors that stop the rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from herdgraph.errors import HerdError
from herdgraph.export.weights import parallel, writer
from herdgraph.export.weights import stream as weights
from herdgraph.export.weights.block import BlockCodes, BlockScales, BlockZeros
from herdgraph.export.weights.experts import Stacked, StackedCodes, StackedScales
from herdgraph.export.weights.packed import PackedExperts, PackedMatrix, PackedScales
from herdgraph.export.weights.parallel import in_parallel
from herdgraph.export.weights.stream import Weight, regrouped, write_channels
from herdgraph.export.weights.writer import Divisible, stream
from herdgraph.model.quantization.formats import BlockFormat, ChannelFormat

INT4, INT8 = BlockFormat(4, 32), ChannelFormat()
HESSIAN = torch.eye(64).add_(0.1)


def _matrix(seed: int) -> ir.Tensor:
    return ir.Tensor(np.random.default_rng(seed).normal(size=(64, 96)).astype(np.float32), name=f"w{seed}")


def _tensors() -> list[ir.TensorProtocol]:
    """Of every kind some."""
    codes = BlockCodes(_matrix(0), INT4, lambda: HESSIAN)
    experts = PackedExperts([PackedMatrix(_matrix(seed), INT8) for seed in range(3)])
    stacked = StackedCodes([BlockCodes(_matrix(seed), INT4) for seed in range(3)])
    rounded = PackedExperts([PackedMatrix(_matrix(seed), INT4, lambda: HESSIAN) for seed in range(3)])
    return [codes, BlockScales(codes), BlockZeros(codes), experts, PackedScales(experts), stacked,
            StackedScales(stacked), Stacked([_matrix(seed) for seed in range(3)]), rounded, _matrix(7)]


def _model(tensors: list[ir.TensorProtocol]) -> ir.Model:
    values = [ir.Value(name=f"w{index}", shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype),
                       const_value=tensor) for index, tensor in enumerate(tensors)]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 24}), ir_version=11)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_bytes_do_not_depend_on_workers(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "workers", lambda: workers)
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1 << 13)
    monkeypatch.setattr(writer, "INLINE_BYTES", 0)
    model = _model(_tensors())
    sizes: list[int] = []
    stream(model, tmp_path, "data", sizes.append)
    for value, alone in zip(model.graph.initializers.values(), _tensors(), strict=True):
        assert value.const_value is not None
        assert value.const_value.tobytes() == alone.tobytes()
    assert sum(sizes) == sum(tensor.nbytes for tensor in _tensors())


def test_what_is_found_on_the_way_is_not_computed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales wait for their codes, in the graph itself, too."""
    read = []

    class Source:
        def read(self, name: str, index: int | slice | None = None) -> torch.Tensor:
            read.append(name)
            return VALUES if index is None else VALUES[index]

    monkeypatch.setattr(writer, "INLINE_BYTES", 300)
    codes = BlockCodes(Weight(Source(), "w", (96, 64)).transposed(), INT4)
    stream(_model([codes, BlockZeros(codes), BlockScales(codes)]), tmp_path, "data")
    assert len(read) == 1


VALUES = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))


def test_experts_are_divisible() -> None:
    for tensor in _tensors():
        if isinstance(tensor, PackedExperts | StackedCodes | Stacked):
            assert isinstance(tensor, Divisible)
            assert sum(part.nbytes for part in tensor.divided()) == tensor.nbytes


def test_the_first_error_stops_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "workers", lambda: 2)
    begun, failed = [], threading.Event()

    def job(number: int) -> None:
        begun.append(number)
        if number == 1:
            failed.set()
            raise HerdError("damaged")
        failed.wait(10)

    with pytest.raises(HerdError, match="damaged"):
        list(in_parallel([lambda number=number: job(number) for number in range(50)]))  # type: ignore[misc]
    assert len(begun) < 50


def test_torch_has_its_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    assert list(in_parallel([lambda: 5])) == [5]
    assert told == [1, 3]


@pytest.mark.parametrize("lengths", [[10], [3, 3, 4], [1] * 10, [0, 7, 0, 3], [4, 4, 2], []])
@pytest.mark.parametrize("count", [1, 4, 10, 99])
def test_rows_in_groups(lengths: list[int], count: int) -> None:
    rows = np.arange(2 * sum(lengths)).reshape(-1, 2)
    groups = list(regrouped(np.split(rows, np.cumsum(lengths)[:-1]) if lengths else [], count))
    assert [len(group) for group in groups[:-1]] == [count] * (len(groups) - 1)
    assert all(0 < len(group) <= count for group in groups)
    np.testing.assert_array_equal(np.concatenate(groups) if groups else rows, rows)


@pytest.mark.parametrize("block", [1, 64, 1 << 20])
def test_columns_are_written_in_blocks(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK_BYTES", block)
    rows = np.random.default_rng(0).integers(0, 255, (23, 9), np.uint8)

    def channels() -> Iterator[np.ndarray]:
        yield from (rows[first : first + 5] for first in range(0, 23, 5))

    with (tmp_path / "data").open("wb") as file:
        write_channels(file.fileno(), channels(), 3, width=23)
    assert (tmp_path / "data").read_bytes()[3:] == rows.T.tobytes()
