"""How a weight is stored in fewer bits: what a format is, and the bytes that it takes. Torch-free.

How values are rounded to a format stands in ``e4m3.py`` for FP8 and in ``export/weights/`` for integers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockFormat:
    """Integer codes in blocks of inputs, each block of an output channel with a scale of its own.

    Attributes:
        bits: 8, or 4 to 6.
        block: inputs that share a scale, a power of two from 16.
        fitted: search for the scale with the least square error; otherwise the block's range decides.
        centered: zero is the middle code, so that no zero points are stored, and scales are bfloat16: what ONNX
            Runtime's products for GPUs read.
    """

    bits: int
    block: int
    fitted: bool = True
    centered: bool = False

    def blocks(self, inputs: int) -> int:
        """Blocks of one output channel."""
        return -(-inputs // self.block)

    def stored_bytes(self, inputs: int, outputs: int) -> int:
        """Bytes of a matrix: the last block is filled up, and 4-bit zero points lie two in a byte."""
        blocks = self.blocks(inputs)
        zeros = -(-blocks // 2) if self.bits == 4 and not self.centered else 0
        return outputs * (blocks * (self.block * self.bits // 8 + (2 if self.centered else 4)) + zeros)


@dataclass(frozen=True)
class ChannelFormat:
    """One byte per weight and a scale per output channel.

    Attributes:
        centered: scales are bfloat16, as in ``BlockFormat``; otherwise float32.
    """

    centered: bool = False

    def stored_bytes(self, inputs: int, outputs: int) -> int:
        """Bytes of a matrix: codes, and a scale per output channel."""
        return outputs * (inputs + (2 if self.centered else 4))


@dataclass(frozen=True)
class Fp8Format:
    """One E4M3 byte per weight, a bfloat16 scale ratio per output channel and one scale per tensor."""

    def stored_bytes(self, inputs: int, outputs: int) -> int:
        """Bytes of a matrix: codes, and a float32 ratio per output channel; without the scale of the tensor."""
        return outputs * (inputs + 4)


Format = BlockFormat | ChannelFormat | Fp8Format

CACHE_BYTES = {"float32": 4, "float16": 2, "bf16": 2, "fp8": 1, "int8": 1}
"""Bytes of an element of keys or values by their type; scales are constants of the graph."""
