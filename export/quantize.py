"""Eight-bit weights in blocks, made while they are written.

Output channel n of a weight [K, N] is cut into blocks b of 32 inputs, each with a scale of its own:

    s[n, b] = max_k |w[k, n]| / 127        q[n, b, k] = round(w[k, n] / s[n, b]) + 128        (k in block b)

The code 128 stands for zero; a last block that K does not fill is filled with it. One scale per output channel
instead, with activations quantised per tensor, loses nine times as much perplexity (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .weights import channels_of, write_all

Array = np.ndarray[Any, Any]

BLOCK = 32
LEVELS = 127
ZERO = 128


class BlockCodes(ir.LazyTensor):
    """The codes of a weight [K, N]: uint8 [N, blocks, 32], as ONNX Runtime's ``MatMulNBits`` reads them.

    Args:
        source: the weight, a ``Weight`` of a checkpoint or any other two-dimensional initializer.
    """

    def __init__(self, source: ir.TensorProtocol) -> None:
        self.source = source
        inputs, channels = source.shape.numpy()
        self.blocks = -(-inputs // BLOCK)
        self.channels = channels
        self._scales: Array | None = None
        shape = ir.Shape((channels, self.blocks, BLOCK))
        super().__init__(lambda: ir.Tensor(self._whole()), dtype=ir.DataType.UINT8, shape=shape)

    def scales(self) -> Array:
        """Scales, float32 [N, blocks]; reads the weight unless its codes have been written."""
        if self._scales is None:
            self._scales = block_scales(in_blocks(self.source.numpy().T))
        return self._scales

    def _whole(self) -> Array:
        return block_codes(in_blocks(self.source.numpy().T), self.scales())

    def write_to(self, file: int, offset: int) -> None:
        """Write the codes at ``offset`` of an open file descriptor, a few output channels at a time."""
        scales = np.empty((self.channels, self.blocks), np.float32)
        start = 0
        for rows_NK in channels_of(self.source):
            blocks = in_blocks(rows_NK)
            part = slice(start, start + len(rows_NK))
            scales[part] = block_scales(blocks)
            write_all(file, block_codes(blocks, scales[part]), offset + start * self.blocks * BLOCK)
            start += len(rows_NK)
        self._scales = scales


class BlockScales(ir.LazyTensor):
    """The scales that belong to ``BlockCodes``, float32 [N, blocks]."""

    def __init__(self, codes: BlockCodes) -> None:
        shape = ir.Shape((codes.channels, codes.blocks))
        super().__init__(lambda: ir.Tensor(codes.scales()), dtype=ir.DataType.FLOAT, shape=shape)


def in_blocks(rows_NK: Array) -> Array:
    """[N, K] to [N, blocks, 32], zeros behind the last input."""
    rest = -rows_NK.shape[1] % BLOCK
    padded = np.pad(rows_NK, ((0, 0), (0, rest))) if rest else rows_NK
    return padded.reshape(len(padded), -1, BLOCK)


def block_scales(blocks: Array) -> Array:
    """Scale of each block of [N, blocks, 32]; 1 for a block of zeros."""
    amax = np.abs(blocks).max(axis=-1).astype(np.float32)
    return np.where(amax > 0, amax / LEVELS, np.float32(1))


def block_codes(blocks: Array, scales: Array) -> Array:
    """Nearest codes, ties to even."""
    return (np.clip(np.rint(blocks / scales[..., None]), -LEVELS, LEVELS) + ZERO).astype(np.uint8)
