"""Weights that no format holds: named while they are written, never turned into other numbers in silence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from herdgraph.errors import HerdError
from herdgraph.export.weights.block import BlockCodes, BlockRounder
from herdgraph.export.weights.channel import channel_scales
from herdgraph.export.weights.rounded import Rounded
from herdgraph.export.weights.stream import Weight
from herdgraph.export.weights.writer import stream
from herdgraph.model.quantization.formats import BlockFormat
from support import graphs


class Source:
    """A reader of one weight that checks nothing, as one that multiplies what it read."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def read(self, _: str, index: int | slice | None = None) -> torch.Tensor:
        return self.value if index is None else self.value[index]


def weight(value: float, *, experts: bool = False) -> Weight:
    stored = torch.ones(3, 4, 32) if experts else torch.ones(4, 32)
    stored[(1, 2, 5) if experts else (2, 5)] = value
    found = Weight(Source(stored), "layers.0.w", tuple(stored.shape))  # type: ignore[arg-type]
    return found.of_expert(1) if experts else found


def written(tensor: ir.TensorProtocol, path: Path) -> None:
    file = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        tensor.write_to(file, 0)  # type: ignore[attr-defined]
    finally:
        os.close(file)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_is_finite_when_it_is_written(value: float, tmp_path: Path) -> None:
    with pytest.raises(HerdError, match=r"layers\.0\.w holds an? \w+ at \[2, 5\]"):
        written(weight(value), tmp_path / "data")
    with pytest.raises(HerdError, match=r"layers\.0\.w \[1\] holds an? \w+ at \[2, 5\]"):
        written(weight(value, experts=True), tmp_path / "data")


def test_small_weights_are_refused_as_large_ones_are(tmp_path: Path) -> None:
    """They are written with the graph, by a library that puts errors of its own around ours."""
    model = graphs.parse("g (float[1] x) => (float[1] y) { y = Identity (x) }")
    model.graph.register_initializer(ir.Value(name="w", const_value=weight(torch.nan)))
    with pytest.raises(HerdError, match=r"layers\.0\.w holds a NaN at \[2, 5\]"):
        stream(model, tmp_path, "data")


@pytest.mark.parametrize(("dtype", "value"), [
    (ir.DataType.FLOAT16, 7e4), (ir.DataType.FLOAT16, -7e4), (ir.DataType.BFLOAT16, 3.4e38),
])
@pytest.mark.parametrize("turned", [False, True])
def test_what_does_not_fit_is_not_made_infinite(
    dtype: ir.DataType, value: float, turned: bool, tmp_path: Path
) -> None:
    source = weight(value)
    rounded = Rounded(source.transposed() if turned else source, dtype)
    for make in (lambda: written(rounded, tmp_path / "data"), rounded.numpy):
        with pytest.raises(HerdError, match=rf"layers\.0\.w holds \S+, {dtype.name.lower()} ends at"):
            make()


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_end_where_squares_do(bits: int) -> None:
    with pytest.raises(HerdError, match=rf"layers\.0\.w holds 3e\+38, weights of {bits} bits end at 1.15e\+18"):
        BlockCodes(weight(3e38), BlockFormat(bits, 32)).parameters()


@pytest.mark.parametrize("smallest", [0.0, 1e-45, 1e-40])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_never_zero(bits: int, smallest: float) -> None:
    rows = np.full((2, 32), smallest, np.float32)
    assert channel_scales(rows).tolist() == [1, 1]
    blocks = BlockRounder(BlockFormat(bits, 32)).quantize(rows)
    assert np.isfinite(blocks.values()).all()
    assert (blocks.scales > 0).all()
    assert np.abs(blocks.values()).max() == 0


def test_a_hessian_that_is_none_is_one_line() -> None:
    hessian = -torch.eye(4)
    with pytest.raises(HerdError, match=r"the Hessian of layers\.0\.w is no sum of squares"):
        BlockCodes(weight(1.0), BlockFormat(4, 32), lambda: hessian).parameters()
