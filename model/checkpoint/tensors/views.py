"""Views of lazily read tensors: how checkpoint layouts cut, stack and transpose what is one canonical tensor.

Each difference between layouts is one small class here, and a reader composes them: two ranks of Meta's experts are
``Concat([Unflatten(MappedTensor), Unflatten(MappedTensor)])``. A part of a view reads only the parts below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .lazy import Index, LazyTensor, bounds


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
        begin, end = bounds(index, self.stop - self.start)
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
        begin, end = bounds(index, self.count)
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
        begin, end = (index, index + 1) if isinstance(index, int) else bounds(index, self.shape[0])
        found = torch.cat([part.read(place) for part, place in self._overlaps(begin, end)])
        return found[0] if isinstance(index, int) else found

    def _overlaps(self, begin: int, end: int) -> list[tuple[LazyTensor, slice]]:
        """Parts that a range of the first axis touches, with the range inside each."""
        found, first = [], 0
        for part in self.parts:
            last = first + part.shape[0]
            if max(begin, first) < min(end, last):
                found.append((part, slice(max(begin, first) - first, min(end, last) - first)))
            first = last
        return found or [(self.parts[0], slice(0, 0))]


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
    """A tensor that has to be read whole and passed through a function."""

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


@dataclass(frozen=True)
class Transposed:
    """A matrix with its axes exchanged."""

    source: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape with the axes exchanged."""
        return self.source.shape[::-1]

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.source.dtype

    def read(self, index: Index = None) -> Tensor:
        """Read the whole, then take the part."""
        whole = self.source.read().T.contiguous()
        return whole if index is None else whole[index]


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
