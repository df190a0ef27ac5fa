"""Lazy initializers: weights that are read only while they are written, and the writer, which holds a few blocks.

A ``Weight`` refers to a tensor of a checkpoint, or to one slice of its first axis (one expert), perhaps transposed.
It is read in blocks of rows, converted, and written at its place in the data file, so that the peak memory of a build
is a few blocks, whatever the size of the model or of its largest tensor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir
import torch

from ...model.checkpoint.finite import require_finite
from ...model.checkpoint.reader import TensorReader
from .origin import Origin, joined_origin, origin_of, with_origin

BLOCK_BYTES = 32 << 20
"""Most bytes of a weight that are read at once."""
ALIGNMENT = 4096
"""Weights start on page boundaries, so that a runtime can map and drop them one by one."""
INLINE_BYTES = 1024
"""Tensors up to this size stay inside of the ONNX file."""


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

    def _read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        if self.expert is None:
            values = self.source.read(self.stored, slice(start, stop))
        else:
            values = self.source.read(self.stored, self.expert)[start:stop]
        found = values.to(torch.float32).contiguous()
        # Whatever is stored was finite when it was read; what it is multiplied with on the way may be too large.
        require_finite(found, self.stored if self.expert is None else f"{self.stored} [{self.expert}]", first=start)
        return found.numpy()

    def _whole(self) -> np.ndarray[Any, Any]:
        values = self._read(0, self.stored_shape[0])
        return np.ascontiguousarray(values.T) if self.is_transposed else values

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
            yield start, self._read(start, min(rows, start + step))

    def channels(self) -> Iterator[np.ndarray[Any, Any]]:
        """A matrix [K, N] by output channels, a few at a time: rows [n, K] in order."""
        if self.is_transposed:
            yield from (block for _, block in self.blocks())
        else:
            yield np.ascontiguousarray(self._whole().T)

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


def write_channels(file: int, channels: Iterator[np.ndarray[Any, Any]], offset: int, *, width: int) -> None:
    """Write rows [n, K] as the columns of a matrix [K, ``width``] at an offset."""
    first = 0
    for rows_NK in channels:
        for column, values in enumerate(np.ascontiguousarray(rows_NK.T)):
            write_all(file, values, offset + values.itemsize * (column * width + first))
        first += len(rows_NK)


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


def initializers(model: ir.Model) -> list[ir.Value]:
    """All initializers of a model, those of subgraphs included."""
    return [value for graph in model.graphs() for value in graph.initializers.values()]


def stream(model: ir.Model, directory: Path, data_name: str, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Write every large initializer of a model into one file and let the model refer to it.

    Args:
        model: changed in place: its initializers become external tensors.
        directory: where the file is created.
        data_name: the file's name, as the ONNX file will refer to it.
        on_bytes: called with the number of bytes after each tensor, for progress.

    Raises:
        HerdError: a weight holds what its format cannot, or cannot be read.
    """
    written: dict[int, ir.ExternalTensor] = {}
    end = 0
    with (directory / data_name).open("wb") as file:
        for value in initializers(model):
            tensor = value.const_value
            if tensor is None:
                continue
            if tensor.nbytes <= INLINE_BYTES:
                tensor.tobytes()  # read once here, where an error is told as it is; saving wraps it in its own
                continue
            if id(tensor) not in written:
                offset = -(-end // ALIGNMENT) * ALIGNMENT
                _write(tensor, file.fileno(), offset)
                end = offset + tensor.nbytes
                written[id(tensor)] = with_origin(ir.ExternalTensor(
                    data_name, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()),
                    name=str(value.name), base_dir=directory,
                ), origin_of(tensor))
                on_bytes(tensor.nbytes)
            value.const_value = written[id(tensor)]
        file.truncate(end)


def _write(tensor: ir.TensorProtocol, file: int, offset: int) -> None:
    if isinstance(tensor, StreamWritable):
        tensor.write_to(file, offset)
    else:
        write_all(file, np.frombuffer(tensor.tobytes(), np.uint8), offset)
