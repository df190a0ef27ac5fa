"""One matrix of every expert as one tensor, outputs before inputs: as ONNX Runtime's fused mixtures read experts.

    float32      [E, N, K]
    8 bits       codes uint8 [E, N, K], scales [E, N]: as in ``channel.py``
    4 bits       codes uint8 [E, N, K / 2], scales [E, N, blocks]: as in ``block.py``

Gate and up projections lie in turns, g0 u0 g1 u1 ..., which is the one order that kernels of a CPU and of a GPU share.
Experts are read and written by themselves, and of what is read a few channels at a time are converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from .block import BlockCodes
from .channel import ChannelCodes
from .origin import origin_of, with_origin
from .packed import whole_rows
from .stream import all_channels, channels_of, chunk_rows, write_all
from .writer import Part

Array = np.ndarray[Any, Any]


class Interleaved(ir.LazyTensor):
    """Gate and up projections side by side, [K, 2F], with their channels in turns.

    Args:
        gate_up: gate columns first, then up.
        multiple: F is filled up to a multiple of it, with channels of zeros.
    """

    def __init__(self, gate_up: ir.TensorProtocol, multiple: int = 1) -> None:
        self.source, self.multiple = gate_up, multiple
        inputs, channels = gate_up.shape.numpy()
        shape = ir.Shape((inputs, 2 * multiple * -(-(channels // 2) // multiple)))
        super().__init__(lambda: ir.Tensor(np.ascontiguousarray(np.concatenate(list(self.channels())).T)),
                         dtype=ir.DataType.FLOAT, shape=shape)
        with_origin(self, origin_of(gate_up))

    def channels(self) -> Iterator[Array]:
        """Output channels in order, a few at a time: rows [n, K]."""
        rows_NK = all_channels(self.source)
        most = chunk_rows(rows_NK.shape[1], self.multiple)
        halves = (whole_rows(iter([half]), self.multiple, most) for half in np.split(rows_NK, 2))
        for gate_nK, up_nK in zip(*halves, strict=True):
            yield np.stack([gate_nK, up_nK], axis=1).reshape(-1, rows_NK.shape[1])


class Stacked(ir.LazyTensor):
    """Matrices [K, N] of all experts as float32 [E, N, K]."""

    def __init__(self, matrices: Sequence[ir.TensorProtocol]) -> None:
        self.matrices = tuple(matrices)
        inputs, channels = self.matrices[0].shape.numpy()
        super().__init__(lambda: ir.Tensor(np.stack(list(map(all_channels, self.matrices)))), dtype=ir.DataType.FLOAT,
                         shape=ir.Shape((len(self.matrices), channels, inputs)))
        with_origin(self, origin_of(self.matrices[0]))

    def divided(self) -> Sequence[Part]:
        """The experts, which are read side by side."""
        return [ExpertRows(partial(channels_of, matrix), matrix.nbytes) for matrix in self.matrices]

    def write_to(self, file: int, offset: int) -> None:
        """Write float32 little-endian values at ``offset`` of an open file descriptor."""
        _write_parts(self.divided(), file, offset)


class StackedCodes(ir.LazyTensor):
    """Codes of one matrix of every expert, uint8 [E, N, bytes of a channel]."""

    def __init__(self, codes: Sequence[BlockCodes] | Sequence[ChannelCodes]) -> None:
        self.codes: tuple[BlockCodes | ChannelCodes, ...] = tuple(codes)
        channels = int(self.codes[0].source.shape.numpy()[1])
        shape = (len(self.codes), channels, self.codes[0].nbytes // channels)
        super().__init__(lambda: ir.Tensor(np.stack(list(map(_rows, self.codes)))), dtype=ir.DataType.UINT8,
                         shape=ir.Shape(shape))
        with_origin(self, origin_of(self.codes[0].source))

    def divided(self) -> Sequence[Part]:
        """The experts, which are rounded side by side."""
        return [each if isinstance(each, BlockCodes) else ExpertRows(each.channels, each.nbytes) for each in self.codes]

    def write_to(self, file: int, offset: int) -> None:
        """Write the codes at ``offset`` of an open file descriptor."""
        _write_parts(self.divided(), file, offset)


class StackedScales(ir.LazyTensor):
    """The scales that belong to ``StackedCodes``, float32 [E, N] or [E, N, blocks]."""

    def __init__(self, stacked: StackedCodes) -> None:
        self.stacked = stacked
        first, channels = stacked.codes[0], stacked.shape.numpy()[1]
        blocks = (first.blocks,) if isinstance(first, BlockCodes) else ()
        super().__init__(lambda: ir.Tensor(np.stack([_scales(each) for each in stacked.codes])),
                         dtype=ir.DataType.FLOAT, shape=ir.Shape((len(stacked.codes), channels, *blocks)))
        with_origin(self, origin_of(stacked))


@dataclass(frozen=True)
class ExpertRows:
    """What one expert takes of a file, rows one after the other.

    Attributes:
        rows: makes them, a few at a time.
        nbytes: how much they are together.
    """

    rows: Callable[[], Iterator[Array]]
    nbytes: int

    def write_to(self, file: int, offset: int) -> None:
        """Write the rows at ``offset`` of an open file descriptor."""
        for some in self.rows():
            write_all(file, some, offset)
            offset += some.nbytes


def _write_parts(parts: Sequence[Part], file: int, offset: int) -> None:
    for part in parts:
        part.write_to(file, offset)
        offset += part.nbytes


def _rows(codes: BlockCodes | ChannelCodes) -> Array:
    """Codes of one expert, [N, bytes of a channel]."""
    found = codes.numpy() if isinstance(codes, BlockCodes) else np.concatenate(list(codes.channels()))
    return found.reshape(len(found), -1)


def _scales(codes: BlockCodes | ChannelCodes) -> Array:
    return codes.parameters()[0] if isinstance(codes, BlockCodes) else codes.scales()
