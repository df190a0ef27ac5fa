"""Packed weights: every byte where kernels.h says, whatever the size, in pieces as at once; refusals."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdgraph.errors import HerdError
from herdgraph.export.weights import packed, stream
from herdgraph.export.weights.block import BlockRounder, filled_up
from herdgraph.export.weights.packed import GateUp, Packable, PackedExperts, PackedMatrix, PackedScales
from herdgraph.export.weights.stream import Weight
from herdgraph.model.quantization.formats import BlockFormat, ChannelFormat, Fp8Format
from herdgraph.model.quantization.packed_sizes import can_pack, packed_bytes

INT8, INT4, INT8_BLOCKS = ChannelFormat(), BlockFormat(4, 32), BlockFormat(8, 64)
BITS = [BlockFormat(bits, 64) for bits in (4, 5, 6)]
FORMATS: list[Packable] = [None, INT8, INT4, INT8_BLOCKS, *BITS]
SIZES = [(64, 32), (1, 1), (70, 33), (130, 96), (33, 5)]


def _weight(inputs: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(inputs, channels)).astype(np.float32)


def _values(codes: np.ndarray, scales: np.ndarray | None, layout: Packable, shape: tuple[int, int]) -> np.ndarray:
    """What a processor reads out of packed codes, one element after the other, as kernels.h describes them."""
    inputs, channels = shape
    whole = -(-inputs // 64) * 64
    found = np.zeros(shape, np.float32)
    for n in range(channels):
        tile, lane = divmod(n, 32)
        for k in range(inputs):
            if layout is None:
                found[k, n] = codes.view(np.float32)[(tile * whole + k) * 32 + lane]
            elif isinstance(layout, ChannelFormat):
                assert scales is not None
                code = codes[((tile * whole // 4 + k // 4) * 32 + lane) * 4 + k % 4]
                found[k, n] = (float(code) - 128) * scales[n]
            elif layout == INT8_BLOCKS:
                record = codes[(tile * whole // 64 + k // 64) * 2176 :][:2176]
                code = record[(k % 64 // 4 * 32 + lane) * 4 + k % 4]
                found[k, n] = (float(code) - 128) * record[2048:].view(np.float32)[lane]
            elif isinstance(layout, BlockFormat) and layout in BITS:
                record = codes[(tile * whole // 64 + k // 64) * (size := 256 * layout.bits + 96) :][:size]
                j, high = k % 64, layout.bits - 4
                place = j // 4 * high
                code = int(record[(j // 8 * 32 + lane) * 4 + j % 4]) >> 4 * (j // 4 % 2) & 15
                if high:
                    above = int(record[1024 + (place // 8 * 32 + lane) * 4 + j % 4])
                    code += (above >> place % 8 & (1 << high) - 1) << 4
                scale = record[-96:-32].view(np.float16)[lane]
                found[k, n] = (float(code) - float(record[size - 32 + lane])) * np.float32(scale)
            else:
                record = codes[(tile * whole // 64 + k // 64) * 1216 :][:1216]
                block, eight, half, place = k % 64 // 32, k % 32 // 8, k % 8 // 4, k % 4
                both = record[((block * 4 + eight) * 32 + lane) * 4 + place]
                code = both >> 4 if half else both & 15
                scale = record[1024:1152].view(np.float16)[block * 32 + lane]
                found[k, n] = (float(code) - float(record[1152 + block * 32 + lane])) * np.float32(scale)
    return found


def _rounded(weight_KN: np.ndarray, layout: Packable) -> np.ndarray:
    """The nearest values of a format, without packing."""
    if layout is None:
        return weight_KN
    if isinstance(layout, ChannelFormat):
        scales = np.maximum(np.abs(weight_KN).max(0), 1e-30) / 127
        return np.rint(weight_KN / scales) * scales
    found = BlockRounder(layout).quantize(filled_up(np.ascontiguousarray(weight_KN.T), layout.block))
    scales = found.scales if layout == INT8_BLOCKS else found.scales.astype(np.float16)
    values = (found.codes.astype(np.float32) - found.zeros[..., None]) * scales[..., None]
    return values.reshape(len(values), -1)[:, : len(weight_KN)].T


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SIZES)
def test_every_element_is_where_a_processor_looks_for_it(shape: tuple[int, int], layout: Packable) -> None:
    weight = _weight(*shape)
    matrix = PackedMatrix(ir.Tensor(weight), layout)
    scales = PackedScales(matrix).numpy() if layout == INT8 else None
    assert len(matrix.numpy()) + (0 if scales is None else scales.nbytes) == packed_bytes(*shape, layout)
    np.testing.assert_allclose(_values(matrix.numpy(), scales, layout, shape), _rounded(weight, layout), rtol=1e-6)


@settings(max_examples=20)
@given(st.integers(1, 140), st.integers(1, 70), st.sampled_from(FORMATS), st.integers(0, 1000))
def test_what_fills_up_is_zero(inputs: int, channels: int, layout: Packable, seed: int) -> None:
    """A product with anything behind the last input, and of any channel behind the last, adds nothing."""
    matrix = PackedMatrix(ir.Tensor(_weight(inputs, channels, seed)), layout)
    scales = matrix.scales() if layout == INT8 else None
    whole = -(-inputs // 64) * 64, -(-channels // 32) * 32
    found = _values(matrix.numpy(), scales, layout, whole)
    assert not found[inputs:].any()
    assert not found[:, channels:].any()


class _Source:
    """A checkpoint of one tensor."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = torch.from_numpy(values)

    def read(self, _name: str, index: int | slice | None = None) -> torch.Tensor:
        return self.values if index is None else self.values[index]


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_pieces_are_the_whole(layout: Packable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows are read at a time: pieces end inside of tiles."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 7 * 70 * 4)
    weight = _weight(70, 75)
    source = Weight(_Source(np.ascontiguousarray(weight.T)), "w", (75, 70)).transposed()
    assert len(list(source.channels())) == 11
    codes, whole = PackedMatrix(source, layout), PackedMatrix(ir.Tensor(weight), layout)
    with (tmp_path / "data").open("wb") as file:
        codes.write_to(file.fileno(), 5)
        assert os.fstat(file.fileno()).st_size == 5 + codes.nbytes
    assert (tmp_path / "data").read_bytes()[5:] == whole.numpy().tobytes()
    np.testing.assert_array_equal(codes.scales(), whole.scales())


@pytest.mark.parametrize("width", [16, 32, 5, 40])
@pytest.mark.parametrize("joined", [True, False])
def test_gate_and_up_share_tiles(width: int, joined: bool) -> None:
    """16 channels of the one, then 16 of the other; both are filled up by themselves."""
    gate, up = _weight(64, width, 1), _weight(64, width, 2)
    both = (np.concatenate([gate, up], axis=1),) if joined else (gate, up)
    pair = GateUp(*map(ir.Tensor, both))
    filled = -(-width // 16) * 16
    assert tuple(pair.shape.numpy()) == (64, 2 * filled) == pair.numpy().shape
    tiles = pair.numpy().reshape(64, -1, 2, 16)
    for half, wanted in enumerate((gate, up)):
        found = tiles[:, :, half].reshape(64, filled)
        np.testing.assert_array_equal(found[:, :width], wanted)
        assert not found[:, width:].any()
    np.testing.assert_array_equal(_values(PackedMatrix(pair, None).numpy(), None, None, (64, 2 * filled)), pair.numpy())


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_experts_lie_one_after_the_other(layout: Packable, tmp_path: Path) -> None:
    experts = PackedExperts([PackedMatrix(ir.Tensor(_weight(70, 40, seed)), layout) for seed in range(3)])
    alone = [PackedMatrix(ir.Tensor(_weight(70, 40, seed)), layout) for seed in range(3)]
    assert experts.numpy().shape == (3, alone[0].nbytes)
    with (tmp_path / "data").open("wb") as file:
        experts.write_to(file.fileno(), 0)
    assert (tmp_path / "data").read_bytes() == b"".join(each.numpy().tobytes() for each in alone)
    if layout == INT8:
        np.testing.assert_array_equal(PackedScales(experts).numpy(), np.stack([each.scales() for each in alone]))


def test_a_scale_that_float16_cannot_hold_is_refused() -> None:
    weight = _weight(64, 32)
    weight[3, 4] = 1.5e6
    matrix = PackedMatrix(ir.Tensor(weight, name="layers.0.feed_forward.down_proj.weight"), INT4)
    with pytest.raises(HerdError, match=r"^layers\.0\.feed_forward\.down_proj\.weight needs a scale of .* in 4 bits, "
                                        r"scales end at 65504: .*$"):
        matrix.numpy()


def test_formats_that_can_be_packed() -> None:
    assert all(can_pack(layout) for layout in FORMATS)
    assert not any(map(can_pack, [BlockFormat(5, 32), BlockFormat(8, 32), Fp8Format()]))
    assert [packed.format_number(layout) for layout in FORMATS] == [0, 1, 2, 3, 4, 5, 6]
