"""Weights as our own CPU operators read them, packed while they are written.

A matrix [K, N] is cut into tiles of 32 output channels; K is filled up with zeros to a multiple of 64, N to one of 32.
``runtimes/native/src/kernels.h`` says what a tile looks like in each format. The file then holds exactly what the
processor reads, in the order in which it reads: loading is mapping.

    float32     no rounding
    8 bits      as in ``channel.py``: a scale per output channel, codes + 128
    4 to 6 bits as in ``block.py``, blocks of 64 inputs (4 bits: of 32 too); scales become float16, zero points bytes
    in blocks   8 bits as in ``block.py``, blocks of 64 inputs

Gate and up projections are packed together, 16 channels of the one and 16 of the other in a tile, so that the product
of a tile gives 16 hidden channels at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...errors import HerdError
from ...model.quantization.formats import BlockFormat, ChannelFormat
from ...model.quantization.packed_sizes import INPUT_BLOCK, SCALE_BLOCK, TILE, codes_bytes, filled
from .block import GPTQ_ROWS, BlockRounder, Blocks, Hessian, inverse_cholesky_of
from .channel import round_channels
from .origin import joined_origin, origin_of, with_origin
from .stream import all_channels, channels_of, chunk_rows, regrouped, write_all

Array = np.ndarray[Any, Any]
Packable = ChannelFormat | BlockFormat | None
"""How a weight can be packed; None for float32."""

INT4_SMALL_BLOCKS, INT8_BLOCKS = 2, 3
"""The numbers of 4 bits in blocks of 32 inputs, and of 8 bits in blocks; see ``format_number``."""

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
        inputs, half = int(self.shape.numpy()[0]), TILE // 2
        gate, up = (whole_rows(rows, half, chunk_rows(inputs, half)) for rows in self._halves())
        for gate_nK, up_nK in zip(gate, up, strict=True):
            both = (rows.reshape(-1, half, inputs) for rows in (gate_nK, up_nK))
            yield np.stack(list(both), axis=1).reshape(-1, inputs)

    def _halves(self) -> tuple[Iterator[Array], Iterator[Array]]:
        if len(self.parts) > 1:
            return channels_of(self.parts[0]), channels_of(self.parts[1])
        gate_NK, up_NK = np.split(all_channels(self.parts[0]), 2)
        return iter([gate_NK]), iter([up_NK])


def format_number(layout: Packable) -> int:
    """The number of a format in an operator's attributes (``Format`` in kernels.h)."""
    if layout is None or isinstance(layout, ChannelFormat):
        return 0 if layout is None else 1
    if layout.bits == 8:
        return INT8_BLOCKS
    return INT4_SMALL_BLOCKS if layout.block == SCALE_BLOCK else layout.bits


class PackedMatrix(ir.LazyTensor):
    """The codes of one matrix [K, N], uint8 [bytes].

    Args:
        source: the weight.
        layout: how it is stored.
        hessian: of its inputs, by which codes are rounded; None to round to nearest.
    """

    def __init__(self, source: ir.TensorProtocol, layout: Packable, hessian: Hessian | None = None) -> None:
        self.source, self.layout, self._hessian = source, layout, hessian
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
        inputs = filled(self.inputs, INPUT_BLOCK)
        factor_KK = inverse_cholesky_of(self.source, self._hessian, inputs)
        most = chunk_rows(inputs, TILE) if factor_KK is None else GPTQ_ROWS
        for rows_NK in whole_tiles(channels_of(self.source), inputs, most):
            if self.layout is None:
                yield pack_float32(rows_NK)
            elif isinstance(self.layout, ChannelFormat):
                codes_NK, scales_N = round_channels(rows_NK, factor_KK)
                scales.append(scales_N)
                yield pack_int8(codes_NK)
            elif self.layout.bits < 8:
                yield self._pack_bits(rows_NK, factor_KK)
            else:
                found = BlockRounder(self.layout).quantize(rows_NK, factor_KK)
                yield pack_int8_blocks(found.codes, found.scales)
        self._scales = np.concatenate(scales) if scales else np.zeros(0, np.float32)

    def _pack_bits(self, rows_NK: Array, factor_KK: Tensor | None) -> Array:
        assert isinstance(self.layout, BlockFormat)
        found = BlockRounder(self.layout).quantize(rows_NK, factor_KK)
        if (largest := float(found.scales.max(initial=0))) > _LARGEST_SCALE:
            raise HerdError(f"{origin_of(self.source).name} needs a scale of {largest:g} in {self.layout.bits} "
                            f"bits, scales end at {_LARGEST_SCALE:g}: the checkpoint is damaged, or build it with "
                            "another recipe")
        if self.layout.block == SCALE_BLOCK:
            return pack_int4(found.codes, found.scales, found.zeros)
        return pack_bits(self.layout.bits, found)


class PackedExperts(ir.LazyTensor):
    """The codes of one matrix of every expert, uint8 [E, bytes], each made by itself."""

    def __init__(self, experts: Sequence[PackedMatrix]) -> None:
        self.experts = tuple(experts)
        shape = ir.Shape((len(self.experts), self.experts[0].nbytes))
        super().__init__(lambda: ir.Tensor(np.stack([each.numpy() for each in self.experts])),
                         dtype=ir.DataType.UINT8, shape=shape)
        with_origin(self, origin_of(self.experts[0]))

    def divided(self) -> Sequence[PackedMatrix]:
        """The experts, which are packed side by side."""
        return self.experts

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


def whole_rows(rows: Iterator[Array], multiple: int, most: int) -> Iterator[Array]:
    """Rows [n, K] in groups of ``most``; zeros fill up the last one to a multiple of some number."""
    for some_NK in regrouped(rows, most):
        rest = -len(some_NK) % multiple
        yield np.pad(some_NK, ((0, rest), (0, 0))) if rest else some_NK


def whole_tiles(rows: Iterator[Array], inputs: int, most: int) -> Iterator[Array]:
    """Rows [n, K] in groups of whole tiles [32 m, ``inputs``], zeros behind the last input and channel."""
    for some_NK in whole_rows(rows, TILE, most):
        rest = inputs - some_NK.shape[1]
        yield np.pad(some_NK, ((0, 0), (0, rest))) if rest else some_NK


def pack_float32(rows_NK: Array) -> Array:
    """[N, K] to [N/32][K][32]."""
    return _tiles(rows_NK.astype(np.float32, copy=False)).view(np.uint8)


def pack_int8(codes_NK: Array) -> Array:
    """Codes [N, K] to [N/32][K/4][32][4]."""
    return _tiles(_fours(codes_NK.astype(np.uint8))).view(np.uint8)


def pack_int8_blocks(codes_NbK: Array, scales_Nb: Array) -> Array:
    """Codes [N, b, 64] and scales [N, b] to records [N/32][K/64][2176] (kernels.h)."""
    channels, blocks, _ = codes_NbK.shape
    return _records(_tiles(_fours(codes_NbK.reshape(channels, -1))), _tiles(scales_Nb), blocks=blocks)


def pack_int4(codes_NbK: Array, scales_Nb: Array, zeros_Nb: Array) -> Array:
    """Codes [N, b, 32], scales and zero points [N, b] to records [N/32][K/64][1216] (kernels.h)."""
    channels, pairs = len(codes_NbK), codes_NbK.shape[1] // 2
    fours = _fours(codes_NbK.reshape(channels, -1))
    nibbles = fours[:, ::2] | fours[:, 1::2] << 4  # of eight inputs, the first four in the low halves
    return _records(_tiles(nibbles), _tiles(scales_Nb).astype(np.float16), _tiles(zeros_Nb).astype(np.uint8),
                    blocks=pairs)


def pack_bits(bits: int, found: Blocks) -> Array:
    """Codes [N, b, 64] of 4 to 6 bits to records [N/32][K/64] (kernels.h): nibbles, the bits above them, parameters."""
    channels, blocks, _ = found.codes.shape
    fours, high = _fours(found.codes.reshape(channels, -1)).view(np.uint32), bits - 4
    low = fours & 0x0F0F0F0F
    parts = [low[:, ::2] | low[:, 1::2] << 4]
    if high:
        above = (fours >> 4 & 0x03030303).reshape(channels, -1, 8 // high)  # groups of four inputs that share bytes
        parts.append(np.bitwise_or.reduce(above << np.arange(0, 8, high, dtype=np.uint32), axis=-1))
    tiles = [_tiles(np.ascontiguousarray(part).view(np.int32)) for part in parts]
    parameters = _tiles(found.scales).astype(np.float16), _tiles(found.zeros).astype(np.uint8)
    return _records(*tiles, *parameters, blocks=blocks)


def _fours(codes_NK: Array) -> Array:
    """Codes of four inputs as one number: int32 [N, K/4]."""
    return np.ascontiguousarray(codes_NK).view(np.int32)


def _tiles(rows_NW: Array) -> Array:
    """Rows [N, W] to tiles [N/32, W, 32], one after the other: torch exchanges the axes of matrices alone in blocks."""
    tiles = torch.from_numpy(rows_NW).reshape(-1, TILE, rows_NW.shape[1])
    found = torch.empty(len(tiles), tiles.shape[2], TILE, dtype=tiles.dtype)
    for tile_TW, found_WT in zip(tiles, found, strict=True):
        found_WT.copy_(tile_TW.T)
    turned: Array = found.numpy()
    return turned


def _records(*parts: Array, blocks: int) -> Array:
    """What belongs to some inputs of a tile side by side: uint8 [N/32, ``blocks``, bytes of a record]."""
    return np.concatenate([part.view(np.uint8).reshape(len(part), blocks, -1) for part in parts], axis=-1)
