"""Bytes of weights as our own CPU operators read them: whole tiles. Torch-free.

What a tile holds stands in ``export/weights/packed.py``, which packs weights, and in ``runtimes/native/src/kernels.h``.
"""

from __future__ import annotations

from .formats import BlockFormat, ChannelFormat, Format

TILE = 32
"""Output channels of a tile."""
INPUT_BLOCK = 64
"""The inputs of a packed matrix are a multiple of it."""
SCALE_BLOCK = 32
"""Inputs that share a scale in the first of the two formats of 4 bits; in all other blocks it is 64."""
RECORD = {(4, SCALE_BLOCK): 1216, (4, INPUT_BLOCK): 1120, (5, INPUT_BLOCK): 1376, (6, INPUT_BLOCK): 1632,
          (8, INPUT_BLOCK): 2176}
"""Bytes of 64 inputs and 32 channels by bits and inputs of a block: codes, float16 scales and zero points, float32
scales alone in 8 bits."""


def can_pack(layout: Format | None) -> bool:
    """Whether there is a packed form of a format, None for float32."""
    in_blocks = isinstance(layout, BlockFormat) and (layout.bits, layout.block) in RECORD
    return layout is None or isinstance(layout, ChannelFormat) or in_blocks


def filled(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


def codes_bytes(inputs: int, channels: int, layout: Format | None) -> int:
    """Bytes of a packed matrix without the scales that lie beside it."""
    return filled(channels, TILE) * _channel_bytes(inputs, layout)


def packed_bytes(inputs: int, channels: int, layout: Format | None, *, shares_tiles: bool = False) -> int:
    """Bytes of a packed matrix with all its scales.

    Args:
        inputs: K.
        channels: N.
        layout: its format.
        shares_tiles: it is a gate or up projection, which has half of each tile.
    """
    scale = 4 if isinstance(layout, ChannelFormat) else 0
    return filled(channels, TILE // 2 if shares_tiles else TILE) * (_channel_bytes(inputs, layout) + scale)


def _channel_bytes(inputs: int, layout: Format | None) -> int:
    inputs = filled(inputs, INPUT_BLOCK)
    if isinstance(layout, BlockFormat):
        return inputs // INPUT_BLOCK * RECORD[layout.bits, layout.block] // TILE
    return inputs * (1 if isinstance(layout, ChannelFormat) else 4)
