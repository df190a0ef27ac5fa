"""Lazy initializers: weights that are read only while they are written, a few blocks at a time.

A ``Weight`` refers to a tensor of a checkpoint, or to one slice of its first axis (one expert), perhaps transposed.
It is read in blocks of rows, converted, and written at its place in the data file, so that the peak memory of a build
is a few blocks, whatever the size of the model or of its largest tensor. What writes them is ``writer.py``.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir
import torch

from ...model.checkpoint.finite import is_finite, require_finite
from ...model.checkpoint.reader import TensorReader
from .origin import Origin, joined_origin, origin_of, with_origin

BLOCK_BYTES = 32 << 20
"""Most bytes of a weight that are read at once."""
CHUNK_BYTES = 1 << 20
"""Bytes of rows that are converted at once: what one step gives is still in the cache when the next one reads it."""


@runtime_checkable
class ChannelIterable(Protocol):
    """A matrix [K, N] that gives its output channels a few at a time."""

    def channels(self) -> Iterator[np.ndarray[Any, Any]]:
        """Rows [n, K] in order."""


@runtime_checkable
class StreamWritable(Protocol):
    """An initializer that writes its values to a file without holding them all in memory."""

    def write_to(self, file: int, offset: int) -> None:
        """Write all values at ``offset`` of an open file descriptor."""


class Weight(ir.LazyTensor):
    """A float32 initializer that is read from a checkpoint only while it is written.

    Args:
        source: where the stored tensor is read.
        stored: canonical name there.
        shape: shape of the stored tensor or, with ``expert``, of one slice of its first axis.
        expert: slice of the first axis, None for the whole tensor.
        transposed: exchange the two axes.
    """

    def __init__(
        self, source: TensorReader, stored: str, shape: tuple[int, ...], *, expert: int | None = None,
        transposed: bool = False,
    ) -> None:
        self.source, self.stored, self.stored_shape = source, stored, shape
        self.expert, self.is_transposed = expert, transposed
        final = ir.Shape(shape[::-1] if transposed else shape)
        super().__init__(lambda: ir.Tensor(self._whole()), dtype=ir.DataType.FLOAT, shape=final, name=stored)
        with_origin(self, Origin((stored,), expert))

    def _read(self, start: int, stop: int) -> torch.Tensor:
        if self.expert is None:
            values = self.source.read(self.stored, slice(start, stop))
        else:
            values = self.source.read(self.stored, self.expert)[start:stop]
        found = values.to(torch.float32)
        # Whatever is stored was finite when it was read; what it is multiplied with on the way may be too large.
        if not is_finite(found if found.is_contiguous() else found.mT):  # a few times faster in the order of memory
            require_finite(found, self.stored if self.expert is None else f"{self.stored} [{self.expert}]", first=start)
        return found

    def _whole(self) -> np.ndarray[Any, Any]:
        values = self._read(0, self.stored_shape[0])
        return (values.T if self.is_transposed else values).contiguous().numpy()

    def of_expert(self, expert: int) -> Weight:
        """The slice of one expert."""
        return Weight(self.source, self.stored, self.stored_shape[1:], expert=expert)

    def transposed(self) -> Weight:
        """The same values with both axes exchanged."""
        return Weight(
            self.source, self.stored, self.stored_shape, expert=self.expert, transposed=not self.is_transposed
        )

    def blocks(self) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """First row and values, in blocks of at most ``BLOCK_BYTES``, of the tensor as stored."""
        rows = self.stored_shape[0]
        step = max(1, BLOCK_BYTES // (4 * max(1, math.prod(self.stored_shape[1:]))))
        if self.expert is not None:
            step = rows  # one expert is read at once: a second read of its first rows would cost as much
        for start in range(0, rows, step):
            yield start, self._read(start, min(rows, start + step)).contiguous().numpy()

    def channels(self) -> Iterator[np.ndarray[Any, Any]]:
        """A matrix [K, N] by output channels, a few at a time: rows [n, K] in order."""
        if self.is_transposed:
            yield from (block for _, block in self.blocks())
        else:
            yield self._read(0, self.stored_shape[0]).T.contiguous().numpy()

    def write_to(self, file: int, offset: int) -> None:
        """Write float32 little-endian values at ``offset`` of an open file descriptor."""
        if self.is_transposed:
            write_channels(file, self.channels(), offset, width=self.stored_shape[0])
            return
        for start, block in self.blocks():
            write_all(file, block, offset + start * block[0].nbytes)


class Joined(ir.LazyTensor):
    """Matrices [K, N1], [K, N2], ... side by side as one [K, N1 + N2 + ...], read and written one after the other."""

    def __init__(self, parts: Sequence[ir.TensorProtocol]) -> None:
        self.parts = tuple(parts)
        inputs = parts[0].shape.numpy()[0]
        self.widths = [part.shape.numpy()[1] for part in parts]
        super().__init__(
            lambda: ir.Tensor(np.concatenate([part.numpy() for part in self.parts], axis=1)),
            dtype=ir.DataType.FLOAT, shape=ir.Shape((inputs, sum(self.widths))),
        )
        with_origin(self, joined_origin(self.parts))

    def channels(self) -> Iterator[np.ndarray[Any, Any]]:
        """All output channels in order, a few at a time: rows [n, K]."""
        for part in self.parts:
            yield from channels_of(part)

    def write_to(self, file: int, offset: int) -> None:
        """Write float32 little-endian values at ``offset`` of an open file descriptor."""
        write_channels(file, self.channels(), offset, width=sum(self.widths))


def channels_of(matrix: ir.TensorProtocol) -> Iterator[np.ndarray[Any, Any]]:
    """Output channels of any initializer [K, N] in order, as rows [n, K], a few at a time when it is streamed."""
    if isinstance(matrix, ChannelIterable):
        yield from matrix.channels()
    else:
        yield np.ascontiguousarray(matrix.numpy().T)


def chunk_rows(inputs: int, multiple: int = 1) -> int:
    """Rows [n, ``inputs``] of float32 that are converted at once, a multiple of some number."""
    return multiple * max(1, CHUNK_BYTES // (4 * max(1, inputs) * multiple))


def regrouped(rows: Iterable[np.ndarray[Any, Any]], count: int) -> Iterator[np.ndarray[Any, Any]]:
    """Rows [n, K] in groups of ``count``, the last one perhaps smaller; what lies together is not copied."""
    waiting: list[np.ndarray[Any, Any]] = []
    for some_NK in rows:
        first = 0
        while (missing := count - sum(map(len, waiting))) <= len(some_NK) - first:
            yield _joined([*waiting, some_NK[first : first + missing]])
            waiting, first = [], first + missing
        if first < len(some_NK):
            waiting.append(some_NK[first:])
    if waiting:
        yield _joined(waiting)


def _joined(rows: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def all_channels(matrix: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    """All output channels of an initializer [K, N] at once: rows [N, K]."""
    return _joined(list(channels_of(matrix)))


def turned(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A matrix with its axes exchanged, in memory of its own; torch does that tile by tile, numpy row by row."""
    found: np.ndarray[Any, Any] = torch.from_numpy(matrix).T.contiguous().numpy()
    return found


def write_channels(file: int, channels: Iterator[np.ndarray[Any, Any]], offset: int, *, width: int) -> None:
    """Write rows [n, K] as the columns of a matrix [K, ``width``] at an offset, in groups of ``BLOCK_BYTES``."""
    first = 0
    for rows_NK in _in_blocks(channels):
        columns_KN = turned(rows_NK)
        for column, values in enumerate([columns_KN] if len(rows_NK) == width else columns_KN):
            write_all(file, values, offset + values.itemsize * (column * width + first))
        first += len(rows_NK)


def _in_blocks(channels: Iterator[np.ndarray[Any, Any]]) -> Iterator[np.ndarray[Any, Any]]:
    """Rows in groups of at most ``BLOCK_BYTES``: fewer would be written in runs of a few bytes."""
    for first_NK in channels:
        count = max(1, BLOCK_BYTES // max(1, first_NK.itemsize * first_NK.shape[1]))
        yield from regrouped(itertools.chain([first_NK], channels), count)


def write_all(file: int, values: np.ndarray[Any, Any], offset: int) -> None:
    """Write an array at an offset, whole: a nearly full disk takes a part first and refuses only the next call."""
    data = values.reshape(-1).view(np.uint8).data
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def expert_of(tensor: ir.TensorProtocol, expert: int) -> ir.TensorProtocol:
    """Slice ``expert`` of the first axis of any initializer, without reading it when it is a ``Weight``."""
    if isinstance(tensor, Weight):
        return tensor.of_expert(expert)
    return with_origin(ir.Tensor(tensor.numpy()[expert]), replace(origin_of(tensor), expert=expert))


def transposed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A two-dimensional initializer with its axes exchanged, without reading it when it is a ``Weight``."""
    if isinstance(tensor, Weight):
        return tensor.transposed()
    return with_origin(ir.Tensor(np.ascontiguousarray(tensor.numpy().T)), origin_of(tensor))
