"""Tensors that are read when somebody asks, and only as much of them as was asked for.

Checkpoint layouts differ in how a tensor is cut, stacked, transposed and scaled. Each difference is one small class
here, and a reader composes them: two shards of Meta's experts are ``Concat([Unflatten(File), Unflatten(File)])``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...errors import HerdError

Index = int | slice | None
"""What to read of the first axis: one entry, a range, or everything."""


class LazyTensor(Protocol):
    """A shape, a type, and a way to read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of what ``read`` gives."""

    def read(self, index: Index = None) -> Tensor:
        """The whole tensor or a part of its first axis."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor at a place in a file, row-major and little-endian.

    It is read, not mapped: mapped pages would count as this process's memory, and a mapping as large as a shard can
    be refused on a machine with less memory than that.

    Attributes:
        path: the file.
        offset: first byte of the tensor.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, index: Index = None) -> Tensor:
        """Read the bytes of the wanted part."""
        if isinstance(index, int):
            return self.read(slice(index, index + 1))[0]
        if not self.shape:
            return self._values(0, ())
        begin, end, _ = (index or slice(None)).indices(self.shape[0])
        return self._values(begin, (max(0, end - begin), *self.shape[1:]))

    def _values(self, first: int, shape: tuple[int, ...]) -> Tensor:
        offset = self.offset + first * math.prod(self.shape[1:]) * self.dtype.itemsize
        count = math.prod(shape) * self.dtype.itemsize
        data = np.fromfile(self.path, np.uint8, count, offset=offset)
        if len(data) != count:
            raise HerdError(f"{self.path} became shorter while it was read: is something writing to it?")
        return torch.from_numpy(data).view(self.dtype).view(shape)


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of a memory-mapped ``.pth`` file."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the mapped tensor."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the mapped tensor."""
        return self.value.dtype

    def read(self, index: Index = None) -> Tensor:
        """A copy of the wanted part."""
        return (self.value if index is None else self.value[index]).clone()


@dataclass(frozen=True)
class Rows:
    """A range of the first axis of another tensor."""

    source: LazyTensor
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the range."""
        return (self.stop - self.start, *self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.source.dtype

    def read(self, index: Index = None) -> Tensor:
        """Read the part that lies in the range."""
        if isinstance(index, int):
            return self.source.read(self.start + index)
        begin, end, _ = (index or slice(None)).indices(self.stop - self.start)
        return self.source.read(slice(self.start + begin, self.start + end))


@dataclass(frozen=True)
class Unflatten:
    """The first axis split in two: [E · N, M] seen as [E, N, M]."""

    source: LazyTensor
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape with the first axis split."""
        return (self.count, self.source.shape[0] // self.count, *self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.source.dtype

    def read(self, index: Index = None) -> Tensor:
        """Read whole entries of the new first axis."""
        rows = self.shape[1]
        if isinstance(index, int):
            return self.source.read(slice(index * rows, (index + 1) * rows))
        begin, end, _ = (index or slice(None)).indices(self.count)
        return self.source.read(slice(begin * rows, end * rows)).unflatten(0, (end - begin, rows))


@dataclass(frozen=True)
class Concat:
    """Several tensors joined along an axis."""

    parts: Sequence[LazyTensor]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parts."""
        return self.parts[0].dtype

    def read(self, index: Index = None) -> Tensor:
        """Read the wanted part of every tensor and join them."""
        if index is None:
            return torch.cat([part.read() for part in self.parts], self.axis)
        if self.axis:
            axis = self.axis - 1 if isinstance(index, int) else self.axis
            return torch.cat([part.read(index) for part in self.parts], axis)
        begin, end = (index, index + 1) if isinstance(index, int) else index.indices(self.shape[0])[:2]
        found = torch.cat([part.read(slice(*bounds)) for part, bounds in self._overlaps(begin, end)])
        return found[0] if isinstance(index, int) else found

    def _overlaps(self, begin: int, end: int) -> list[tuple[LazyTensor, tuple[int, int]]]:
        """Parts that a range of the first axis touches, with the range inside each."""
        found, first = [], 0
        for part in self.parts:
            last = first + part.shape[0]
            if max(begin, first) < min(end, last):
                found.append((part, (max(begin, first) - first, min(end, last) - first)))
            first = last
        return found or [(self.parts[0], (0, 0))]


@dataclass(frozen=True)
class Stack:
    """Equal tensors as entries of a new first axis."""

    parts: Sequence[LazyTensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of tensors, then their shape."""
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return self.parts[0].dtype

    def read(self, index: Index = None) -> Tensor:
        """Read the wanted entries."""
        if isinstance(index, int):
            return self.parts[index].read()
        return torch.stack([part.read() for part in self.parts[index or slice(None)]])


@dataclass(frozen=True)
class Converted:
    """A tensor that has to be read whole and passed through a function, such as a transposition."""

    source: LazyTensor
    convert: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.source.dtype

    def read(self, index: Index = None) -> Tensor:
        """Convert the whole, then take the part."""
        whole = self.convert(self.source.read())
        return whole if index is None else whole[index]


def transposed(source: LazyTensor) -> LazyTensor:
    """A matrix with its axes exchanged."""
    return Converted(source, lambda value: value.T.contiguous(), source.shape[::-1])


@dataclass(frozen=True)
class Scaled:
    """A quantised tensor with its scale: value = stored · scale, in float32.

    ``scale`` has the rank of the stored tensor; axes of size 1 are shared.
    """

    source: LazyTensor
    scale: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        """What the product has."""
        return torch.float32

    def read(self, index: Index = None) -> Tensor:
        """Dequantise the wanted part."""
        # A slice keeps the axis and with it the alignment with the scale.
        place = slice(index, index + 1) if isinstance(index, int) else index
        scale = self.scale.read(place if self.scale.shape[0] > 1 else None)
        values = self.source.read(place).float() * scale.float()
        return values[0] if isinstance(index, int) else values


@dataclass(frozen=True)
class Reshaped:
    """A small tensor, such as a scale, under another shape."""

    source: LazyTensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.source.dtype

    def read(self, index: Index = None) -> Tensor:
        """Read the whole, then take the part."""
        whole = self.source.read().reshape(self.shape)
        return whole if index is None else whole[index]

