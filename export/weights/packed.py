"""Weights as our own CPU operators read them, packed while they are written.

A matrix [K, N] is cut into tiles of 32 output channels; K is filled up with zeros to a multiple of 64, N to one of 32.
``runtimes/native/src/kernels.h`` says what a tile looks like in each format. The file then holds exactly what the
processor reads, in the order in which it reads: loading is mapping.

    float32     no rounding
    8 bits      as in ``channel.py``: a scale per output channel, codes + 128
    4 bits      as in ``block.py``, blocks of 32 inputs; scales become float16 and zero points bytes
    in blocks   8 bits as in ``block.py``, blocks of 64 inputs

Gate and up projections are packed together, 16 channels of the one and 16 of the other in a tile, so that the product
of a tile gives 16 hidden channels at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ...errors import HerdError
from ...model.quantization.formats import BlockFormat, ChannelFormat
from ...model.quantization.packed_sizes import INPUT_BLOCK, TILE, codes_bytes, filled
from .block import BlockRounder, inverse_cholesky_of
from .channel import ZERO, channel_scales
from .origin import joined_origin, origin_of, with_origin
from .stream import channels_of, write_all

Array = np.ndarray[Any, Any]
Packable = ChannelFormat | BlockFormat | None
"""How a weight can be packed; None for float32."""

INT8_BLOCKS = 3
"""The number of 8 bits in blocks; see ``format_number``."""

_LARGEST_SCALE = float(np.finfo(np.float16).max)


class GateUp(ir.LazyTensor):
    """Gate and up projections [K, F] as one matrix [K, 2F]: 16 channels of the one, then 16 of the other.

    Args:
        gate_up: both, or one matrix [K, 2F] that holds them side by side. F is filled up to a multiple of 16.
    """

    def __init__(self, *gate_up: ir.TensorProtocol) -> None:
        self.parts = gate_up
        inputs, channels = gate_up[0].shape.numpy()
        width = channels if len(gate_up) > 1 else channels // 2
        shape = ir.Shape((inputs, 2 * filled(width, TILE // 2)))
        super().__init__(lambda: ir.Tensor(np.ascontiguousarray(np.concatenate(list(self.channels())).T)),
                         dtype=ir.DataType.FLOAT, shape=shape)
        with_origin(self, joined_origin(gate_up) if len(gate_up) > 1 else origin_of(gate_up[0]))

    def channels(self) -> Iterator[Array]:
        """Output channels in order, a few at a time: rows [n, K]."""
        gate, up = (whole_rows(rows, TILE // 2) for rows in self._halves())
        for gate_nTK, up_nTK in zip(gate, up, strict=True):
            yield np.stack([gate_nTK, up_nTK], axis=1).reshape(-1, gate_nTK.shape[-1])

    def _halves(self) -> tuple[Iterator[Array], Iterator[Array]]:
        if len(self.parts) > 1:
            return channels_of(self.parts[0]), channels_of(self.parts[1])
        rows_NK = np.concatenate(list(channels_of(self.parts[0])))
        half = len(rows_NK) // 2
        return iter([rows_NK[:half]]), iter([rows_NK[half:]])


def format_number(layout: Packable) -> int:
    """The number of a format in an operator's attributes (``Format`` in kernels.h)."""
    if layout is None or isinstance(layout, ChannelFormat):
        return 0 if layout is None else 1
    return 2 if layout.bits == 4 else INT8_BLOCKS


class PackedMatrix(ir.LazyTensor):
    """The codes of one matrix [K, N], uint8 [bytes].

    Args:
        source: the weight.
        layout: how it is stored.
        hessian_KK: XᵀX of its inputs X, by which 4-bit codes are rounded; None to round to nearest.
    """

    def __init__(self, source: ir.TensorProtocol, layout: Packable, hessian_KK: Tensor | None = None) -> None:
        self.source, self.layout, self._hessian_KK = source, layout, hessian_KK
        self.inputs, self.channels = source.shape.numpy()
        self._scales: Array | None = None
        count = codes_bytes(self.inputs, self.channels, layout)
        super().__init__(lambda: ir.Tensor(self._whole()), dtype=ir.DataType.UINT8, shape=ir.Shape((count,)))
        with_origin(self, origin_of(source))

    def write_to(self, file: int, offset: int) -> None:
        """Write the codes at ``offset`` of an open file descriptor, some tiles at a time."""
        for codes in self._packed():
            write_all(file, codes, offset)
            offset += codes.nbytes

    def scales(self) -> Array:
        """Scales of 8-bit channels, float32 [N filled up]; reads the weight unless it has been written."""
        if self._scales is None:
            for _ in self._packed():
                pass
        assert self._scales is not None
        return self._scales

    def _whole(self) -> Array:
        return np.concatenate([codes.reshape(-1) for codes in self._packed()])

    def _packed(self) -> Iterator[Array]:
        scales: list[Array] = []
        factor_KK = inverse_cholesky_of(self.source, self._hessian_KK, filled(self.inputs, INPUT_BLOCK))
        for rows_NK in whole_tiles(channels_of(self.source), filled(self.inputs, INPUT_BLOCK)):
            if self.layout is None:
                yield pack_float32(rows_NK)
            elif isinstance(self.layout, ChannelFormat):
                scales.append(channel_scales(rows_NK))
                yield pack_int8(np.rint(rows_NK / scales[-1][:, None]) + ZERO)
            elif self.layout.bits == 4:
                yield self._pack_int4(rows_NK, factor_KK)
            else:
                found = BlockRounder(self.layout).quantize(rows_NK, factor_KK)
                yield pack_int8_blocks(found.codes, found.scales)
        self._scales = np.concatenate(scales) if scales else np.zeros(0, np.float32)

    def _pack_int4(self, rows_NK: Array, factor_KK: Tensor | None) -> Array:
        assert isinstance(self.layout, BlockFormat)
        found = BlockRounder(self.layout).quantize(rows_NK, factor_KK)
        if (largest := float(found.scales.max(initial=0))) > _LARGEST_SCALE:
            raise HerdError(f"{origin_of(self.source).name} needs a scale of {largest:g} in 4 bits, scales end at "
                            f"{_LARGEST_SCALE:g}: the checkpoint is damaged, or build it with another recipe")
        return pack_int4(found.codes, found.scales, found.zeros)


class PackedExperts(ir.LazyTensor):
    """The codes of one matrix of every expert, uint8 [E, bytes], each made by itself."""

    def __init__(self, experts: Sequence[PackedMatrix]) -> None:
        self.experts = tuple(experts)
        shape = ir.Shape((len(self.experts), self.experts[0].nbytes))
        super().__init__(lambda: ir.Tensor(np.stack([each.numpy() for each in self.experts])),
                         dtype=ir.DataType.UINT8, shape=shape)
        with_origin(self, origin_of(self.experts[0]))

    def write_to(self, file: int, offset: int) -> None:
        """Write the codes at ``offset`` of an open file descriptor, one expert after the other."""
        for expert in self.experts:
            expert.write_to(file, offset)
            offset += expert.nbytes


class PackedScales(ir.LazyTensor):
    """The scales that belong to 8-bit codes, float32 [N], or [E, N] of experts."""

    def __init__(self, codes: PackedMatrix | PackedExperts) -> None:
        matrices = codes.experts if isinstance(codes, PackedExperts) else (codes,)
        count = filled(matrices[0].channels, TILE)
        shape = ir.Shape((len(matrices), count) if isinstance(codes, PackedExperts) else (count,))
        super().__init__(lambda: ir.Tensor(np.concatenate([each.scales() for each in matrices]).reshape(shape.numpy())),
                         dtype=ir.DataType.FLOAT, shape=shape)


def whole_rows(rows: Iterator[Array], count: int) -> Iterator[Array]:
    """Rows [n, K] regrouped to [m, ``count``, K]; zeros fill up the last group."""
    left: Array | None = None
    for some_NK in rows:
        both = some_NK if left is None or not len(left) else np.concatenate([left, some_NK])
        ready = len(both) // count * count
        if ready:
            yield both[:ready].reshape(-1, count, both.shape[1])
        left = both[ready:]
    if left is not None and len(left):
        yield np.pad(left, ((0, count - len(left)), (0, 0)))[None]


def whole_tiles(rows: Iterator[Array], inputs: int) -> Iterator[Array]:
    """Rows [n, K] regrouped to whole tiles [32 m, ``inputs``], zeros behind the last input and channel."""
    for tiles_nTK in whole_rows(rows, TILE):
        flat = tiles_nTK.reshape(-1, tiles_nTK.shape[-1])
        rest = inputs - flat.shape[1]
        yield np.pad(flat, ((0, 0), (0, rest))) if rest else flat


def pack_float32(rows_NK: Array) -> Array:
    """[N, K] to [N/32][K][32]."""
    tiles = rows_NK.astype(np.float32, copy=False).reshape(-1, TILE, rows_NK.shape[1])
    return np.ascontiguousarray(tiles.transpose(0, 2, 1)).view(np.uint8)


def pack_int8(codes_NK: Array) -> Array:
    """Codes [N, K] to [N/32][K/4][32][4]."""
    tiles = codes_NK.astype(np.uint8).reshape(-1, TILE, codes_NK.shape[1] // 4, 4)
    return np.ascontiguousarray(tiles.transpose(0, 2, 1, 3))


def pack_int8_blocks(codes_NbK: Array, scales_Nb: Array) -> Array:
    """Codes [N, b, 64] and scales [N, b] to records [N/32][K/64][2176] (kernels.h)."""
    tiles, blocks = len(codes_NbK) // TILE, codes_NbK.shape[1]
    codes = codes_NbK.reshape(tiles, TILE, blocks, -1, 4).transpose(0, 2, 3, 1, 4)
    scales = np.ascontiguousarray(scales_Nb.reshape(tiles, TILE, blocks).transpose(0, 2, 1)).view(np.uint8)
    return np.concatenate([codes.reshape(tiles, blocks, -1), scales], axis=-1)


def pack_int4(codes_NbK: Array, scales_Nb: Array, zeros_Nb: Array) -> Array:
    """Codes [N, b, 32], scales and zero points [N, b] to records [N/32][K/64][1216] (kernels.h)."""
    tiles, pairs = len(codes_NbK) // TILE, codes_NbK.shape[1] // 2
    # channel, pair of blocks, block, eight inputs, which four of them, input
    codes = codes_NbK.reshape(tiles, TILE, pairs, 2, 4, 2, 4)
    nibbles = (codes[..., 0, :] | codes[..., 1, :] << 4).transpose(0, 2, 3, 4, 1, 5)
    both = [values.reshape(tiles, TILE, pairs, 2).transpose(0, 2, 3, 1) for values in (scales_Nb, zeros_Nb)]
    parts = (nibbles.astype(np.uint8), both[0].astype(np.float16), both[1].astype(np.uint8))
    records = [np.ascontiguousarray(part).reshape(tiles, pairs, -1).view(np.uint8) for part in parts]
    return np.concatenate(records, axis=-1)
