"""Weights of 8, or 4 to 6, bits in blocks, made while they are written.

Output channel n of a weight [K, N] is cut into blocks b of 32, 64 or 128 inputs, each with a scale of its own:

    8 bits  s[n, b] = max_k |w[k, n]| / 127                  q = round(w / s) + 128                 (zero at 128)
    4 bits  s[n, b] = f · (max_k w - min_k w) / 15           q = clip(round(w / s) + z, 0, 15)      z an integer
                                                             5 and 6 bits with 31 and 63 in the place of 15
  centered  s[n, b] = f · max(max_k w / 7, -min_k w / 8)     q = clip(round(w / s) + 8, 0, 15)      in 4 bits

A scale that clips the ends of a block a little often fits the rest better: f is searched for the least square error.
Scales of centered blocks are rounded to bfloat16 before codes are chosen by them.
With the Hessian of the inputs, rounding also makes up for its own errors (``gptq.py``). A last block that K does
not fill is filled with zeros.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from ...errors import HerdError
from ...model.quantization.formats import BlockFormat
from .gptq import gptq_quantize, inverse_hessian_cholesky
from .origin import origin_of
from .stream import channels_of, chunk_rows, regrouped, write_all

Array = np.ndarray[Any, Any]
Hessian = Callable[[], Tensor | None]
"""Reads the Hessian XᵀX of the inputs X of a weight, [K, K]; None when it was not measured."""

SHRINKS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Candidates for f: a block of less than 8 bits is fitted to this share of its range."""
LARGEST = 2.0**60
"""The largest weight that is rounded in blocks: squares of errors, which choose a scale, are finite in float32."""
GPTQ_ROWS = 2048
"""Output channels that are rounded together by a Hessian: its steps are many, and each is to have enough to do."""
_ONE_FACTOR = threading.Lock()
_TINY = torch.finfo(torch.float32).tiny
"""Smaller scales lose their own precision, and dividing by them overflows: such blocks are rounded to zeros."""


@dataclass(frozen=True)
class BlockRounder:
    """Rounds weights to a block format.

    Attributes:
        layout: bits, block, and whether scales are searched.
    """

    layout: BlockFormat

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return self.layout.block

    def quantize(self, rows_NK: Array, factor_KK: Tensor | None = None) -> Blocks:
        """Quantize rows, K a multiple of the block, to codes from 0 to the format's largest.

        Args:
            rows_NK: float32.
            factor_KK: ``gptq.inverse_hessian_cholesky`` of the inputs, None to round to nearest.
        """
        weight_KN = torch.from_numpy(rows_NK).T.contiguous()
        if factor_KK is None:
            blocks = weight_KN.unflatten(0, (-1, self.block))
            scales, zeros = self.fit(blocks)
            codes = self.round(blocks, scales, zeros)
        else:
            codes, scales, zeros = gptq_quantize(weight_KN, factor_KK, self)
        codes = codes.add_(zeros[:, None]).to(torch.uint8).permute(2, 0, 1).contiguous()
        return Blocks(codes.numpy(), scales.T.contiguous().numpy(), zeros.T.to(torch.uint8).contiguous().numpy())

    def fit(self, blocks: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scales and zero points [b, N] of blocks [b, K, N]; ``weight`` [b, K] says which errors matter."""
        if self.layout.bits == 8:
            return _symmetric(blocks, bf16=self.layout.centered)
        shrinks = SHRINKS if self.layout.fitted else (1.0,)
        candidates = (_centered(blocks, shrinks) if self.layout.centered
                      else _ranged(blocks, shrinks, 2**self.layout.bits - 1))
        return self._searched(blocks, weight, candidates)

    def round(self, blocks: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Nearest codes less zero points as float32, ties to even."""
        lowest, highest = (1, 255) if self.layout.bits == 8 else (0, 2**self.layout.bits - 1)
        zeros = zeros[:, None]
        return (blocks / scales[:, None]).round_().clamp_(lowest - zeros, highest - zeros)

    def _searched(
        self, blocks: Tensor, weight: Tensor | None, candidates: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The candidate of scales and zero points with the least weighted square error."""
        shape = blocks.shape[0], blocks.shape[2]
        least, scales, zeros = torch.full(shape, torch.inf), torch.ones(shape), torch.zeros(shape)
        lowest, highest = 0, 2**self.layout.bits - 1
        for scale, zero in candidates:
            values, zero_1 = blocks / scale[:, None], zero[:, None]
            errors = values.round().clamp_(lowest - zero_1, highest - zero_1).sub_(values).square_()
            error = (errors.sum(1) if weight is None else (weight[:, None] @ errors)[:, 0]).mul_(scale.square())
            better = error < least
            scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
            least = torch.minimum(least, error)
        return scales, zeros


class Blocks(NamedTuple):
    """A quantized weight: codes uint8 [N, b, K], scales float32 [N, b], zero points uint8 [N, b]."""

    codes: Array
    scales: Array
    zeros: Array

    def values(self) -> Array:
        """What the codes stand for, float32 [N, b, K]."""
        return (self.codes.astype(np.float32) - self.zeros[..., None]) * self.scales[..., None]


class BlockCodes(ir.LazyTensor):
    """The codes of a weight [K, N]: uint8 [N, blocks, block · bits / 8], as ONNX Runtime's ``MatMulNBits`` reads them.

    Args:
        source: the weight, one of a checkpoint or any other two-dimensional initializer.
        layout: bits and block.
        hessian: of the inputs, None to round to nearest.
    """

    def __init__(self, source: ir.TensorProtocol, layout: BlockFormat, hessian: Hessian | None = None) -> None:
        self.source, self.layout = source, layout
        inputs, self.channels = source.shape.numpy()
        self.blocks = layout.blocks(inputs)
        self._hessian = hessian
        self._found: tuple[Array, Array] | None = None
        shape = ir.Shape((self.channels, self.blocks, layout.block * layout.bits // 8))
        super().__init__(lambda: ir.Tensor(self._whole()), dtype=ir.DataType.UINT8, shape=shape)

    def parameters(self) -> tuple[Array, Array]:
        """Scales float32 [N, b] and zero points uint8 [N, b]; reads the weight unless its codes have been written."""
        if self._found is None:
            self._quantize(lambda _first, _codes: None)
        assert self._found is not None
        return self._found

    def write_to(self, file: int, offset: int) -> None:
        """Write the codes at ``offset`` of an open file descriptor, a few output channels at a time."""
        self._quantize(lambda first, codes: write_all(file, codes, offset + first * codes[0].nbytes))

    def _whole(self) -> Array:
        whole = np.empty(self.shape.numpy(), np.uint8)

        def place(first: int, codes: Array) -> None:
            whole[first : first + len(codes)] = codes

        self._quantize(place)
        return whole

    def _quantize(self, use: Callable[[int, Array], None]) -> None:
        scales = np.empty((self.channels, self.blocks), np.float32)
        zeros = np.empty((self.channels, self.blocks), np.uint8)
        inputs = self.blocks * self.layout.block
        first, factor_KK = 0, inverse_cholesky_of(self.source, self._hessian, inputs)
        rounder = BlockRounder(self.layout)
        most = chunk_rows(inputs) if factor_KK is None else GPTQ_ROWS
        for rows_NK in regrouped(channels_of(self.source), most):
            self._check(rows_NK)
            found = rounder.quantize(filled_up(rows_NK, self.layout.block), factor_KK)
            part = slice(first, first + len(rows_NK))
            scales[part], zeros[part] = found.scales, found.zeros
            use(first, found.codes if self.layout.bits == 8 else packed(found.codes))
            first += len(rows_NK)
        self._found = scales, zeros

    def _check(self, rows_NK: Array) -> None:
        if rows_NK.size and (largest := max(float(rows_NK.max()), -float(rows_NK.min()))) > LARGEST:
            raise HerdError(f"{origin_of(self.source).name} holds {largest:g}, weights of {self.layout.bits} bits end "
                            f"at {LARGEST:.3g}: the checkpoint is damaged, or build it with another recipe")


class BlockScales(ir.LazyTensor):
    """The scales that belong to ``BlockCodes``, float32 [N, blocks]."""

    def __init__(self, codes: BlockCodes) -> None:
        shape = ir.Shape((codes.channels, codes.blocks))
        super().__init__(lambda: ir.Tensor(codes.parameters()[0]), dtype=ir.DataType.FLOAT, shape=shape)


class BlockZeros(ir.LazyTensor):
    """The zero points that belong to 4-bit ``BlockCodes``, two in a byte: uint8 [N, ceil(blocks / 2)]."""

    def __init__(self, codes: BlockCodes) -> None:
        shape = ir.Shape((codes.channels, -(-codes.blocks // 2)))
        super().__init__(lambda: ir.Tensor(packed(codes.parameters()[1])), dtype=ir.DataType.UINT8, shape=shape)


def inverse_cholesky_of(weight: ir.TensorProtocol, hessian: Hessian | None, inputs: int) -> Tensor | None:
    """What GPTQ rounds a weight by, None without a Hessian; ``inputs`` that fill up the last block count as never seen.

    One at a time, whatever else is computed: the factors of a large Hessian are the largest matrices of a build.

    Raises:
        HerdError: the Hessian cannot be one.
    """
    if hessian is None:
        return None
    with _ONE_FACTOR:
        if (hessian_KK := hessian()) is None:
            return None
        if rest := inputs - len(hessian_KK):
            hessian_KK = functional.pad(hessian_KK, (0, rest, 0, rest))
        # The only reference is handed over: memory for one matrix less.
        only = [hessian_KK]
        del hessian_KK
        try:
            return inverse_hessian_cholesky(only.pop())
        except RuntimeError as error:  # LinAlgError, which torch does not export
            raise HerdError(f"the Hessian of {origin_of(weight).name} is no sum of squares: write the calibration "
                            "again with `herdgraph calibrate`") from error


def filled_up(rows_NK: Array, block: int) -> Array:
    """Rows with zeros behind the last input, up to whole blocks."""
    rest = -rows_NK.shape[1] % block
    return np.pad(rows_NK, ((0, 0), (0, rest))) if rest else rows_NK


def packed(nibbles: Array) -> Array:
    """Pairs of 4-bit values of the last axis in one byte, the first in the low half; an odd end is filled with 0."""
    if nibbles.shape[-1] % 2:
        nibbles = np.concatenate([nibbles, np.zeros_like(nibbles[..., :1])], axis=-1)
    return np.ascontiguousarray(nibbles[..., ::2] | (nibbles[..., 1::2] << 4))


def _symmetric(blocks: Tensor, *, bf16: bool) -> tuple[Tensor, Tensor]:
    """The scale that maps a block's largest magnitude to 127, and zero points of 128."""
    scale = _usable(blocks.abs().amax(1) / 127)
    return scale.bfloat16().float() if bf16 else scale, torch.full(scale.shape, 128.0)


def _centered(blocks: Tensor, shrinks: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """4-bit scales in bfloat16 that are some shares of the range, and zeros of 8."""
    whole = torch.maximum(blocks.amax(1) / 7, blocks.amin(1) / -8)
    for shrink in shrinks:
        yield _usable((whole * shrink).bfloat16().float()), torch.full(whole.shape, 8.0)


def _ranged(blocks: Tensor, shrinks: Sequence[float], largest: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales that are some shares of the range of codes 0 .. ``largest``, and zero points."""
    low, high = blocks.amin(1).clamp(max=0), blocks.amax(1).clamp(min=0)
    for shrink in shrinks:
        scale = _usable((high - low) * shrink / largest)
        yield scale, (-low / scale + largest / 2 * (shrink - 1) / shrink).round_().clamp_(0, largest)


def _usable(scale: Tensor) -> Tensor:
    """Scales, 1 in the place of those of a block of zeros or too small for float32."""
    return torch.where(scale >= _TINY, scale, 1.0)
