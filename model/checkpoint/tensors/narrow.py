"""Parts of lazily read tensors along any axis: what one of several ranks holds, read without the rest.

A range is pushed down through the views of ``views.py`` to the files. Only what has to be converted as a whole, such
as resampled positions, is read whole.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from ....errors import HerdError
from ..quantized import Scaled
from .lazy import FileTensor, Index, LazyTensor, MappedTensor, bounds
from .views import Concat, Rows, Stack, Transposed, Unflatten


def parts_of(tensor: LazyTensor, parts: Mapping[int, tuple[range, ...]]) -> LazyTensor:
    """The ranges of some axes put side by side, as ``model.config.shard_plan.Parts`` names them."""
    for axis, ranges in parts.items():
        found = [narrowed(tensor, axis, part) for part in ranges]
        tensor = found[0] if len(found) == 1 else Concat(found, axis)
    return tensor


def narrowed(tensor: LazyTensor, axis: int, part: range) -> LazyTensor:
    """A range of one axis; the tensor itself when that is all of it."""
    return tensor if len(part) == tensor.shape[axis] else _narrowed(tensor, axis, part)


@dataclass(frozen=True)
class Narrowed:
    """A range of one axis of a tensor that has to be read whole."""

    source: LazyTensor
    axis: int
    part: range

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the range."""
        return _resized(self.source.shape, self.axis, len(self.part))

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.source.dtype

    def read(self, index: Index = None) -> Tensor:
        """Read the whole, then take the part."""
        whole = self.source.read().narrow(self.axis, self.part.start, len(self.part)).contiguous()
        return whole if index is None else whole[index]


@dataclass(frozen=True)
class FileBox:
    """A range of every axis of a tensor in a file: only its bytes are read, one run after the other."""

    source: FileTensor
    box: tuple[range, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the box."""
        return tuple(map(len, self.box))

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.source.dtype

    def read(self, index: Index = None) -> Tensor:
        """Read the wanted part of the first axis.

        Raises:
            HerdError: the file has become shorter since it was opened.
        """
        if isinstance(index, int):
            return self.read(slice(index, index + 1))[0]
        begin, end = bounds(index, len(self.box[0]))
        box = (self.box[0][begin:end], *self.box[1:])
        values = torch.empty(tuple(map(len, box)), dtype=self.dtype)
        runs, whole = self._runs(box), self.source
        data = values.flatten().view(torch.uint8).numpy()
        size = len(data) // max(1, len(runs))
        with whole.path.open("rb", buffering=0) as file:
            for run, first in enumerate(runs):
                target = data[run * size : (run + 1) * size].data
                if os.preadv(file.fileno(), [target], whole.offset + first * self.dtype.itemsize) != size:
                    raise HerdError(f"{whole.path} became shorter while it was read: is something writing to it?")
        return values

    def _runs(self, box: tuple[range, ...]) -> list[int]:
        """First elements, in the whole tensor, of the longest runs that lie in the file as they lie in the box."""
        shape = self.source.shape
        last = max(axis for axis, part in enumerate(box) if axis == 0 or len(part) < shape[axis])
        steps = [math.prod(shape[axis + 1 :]) for axis in range(last + 1)]
        if not all(map(len, box)):
            return []
        places = itertools.product(*box[:last], box[last][:1])
        return [sum(map(int.__mul__, place, steps)) for place in places]


@singledispatch
def _narrowed(tensor: LazyTensor, axis: int, part: range) -> LazyTensor:
    return Rows(tensor, part.start, part.stop) if axis == 0 else Narrowed(tensor, axis, part)


@_narrowed.register
def _(tensor: FileTensor, axis: int, part: range) -> LazyTensor:
    return _narrowed(FileBox(tensor, tuple(map(range, tensor.shape))), axis, part)


@_narrowed.register
def _(tensor: FileBox, axis: int, part: range) -> LazyTensor:
    inside = tensor.box[axis][part.start : part.stop]
    return FileBox(tensor.source, (*tensor.box[:axis], inside, *tensor.box[axis + 1 :]))


@_narrowed.register
def _(tensor: MappedTensor, axis: int, part: range) -> LazyTensor:
    return MappedTensor(tensor.value.narrow(axis, part.start, len(part)))


@_narrowed.register
def _(tensor: Transposed, axis: int, part: range) -> LazyTensor:
    return Transposed(narrowed(tensor.source, 1 - axis, part))


@_narrowed.register
def _(tensor: Rows, axis: int, part: range) -> LazyTensor:
    if axis:
        return Rows(narrowed(tensor.source, axis, part), tensor.start, tensor.stop)
    return narrowed(tensor.source, 0, range(tensor.start + part.start, tensor.start + part.stop))


@_narrowed.register
def _(tensor: Unflatten, axis: int, part: range) -> LazyTensor:
    rows = tensor.shape[1]
    if axis == 0:
        return Unflatten(narrowed(tensor.source, 0, range(part.start * rows, part.stop * rows)), len(part))
    if axis > 1:
        return Unflatten(narrowed(tensor.source, axis - 1, part), tensor.count)
    first = range(part.start, part.start + rows * tensor.count, rows)
    return Stack([narrowed(tensor.source, 0, range(begin, begin + len(part))) for begin in first])


@_narrowed.register
def _(tensor: Concat, axis: int, part: range) -> LazyTensor:
    if axis != tensor.axis:
        return Concat([narrowed(source, axis, part) for source in tensor.parts], tensor.axis)
    found, first = [], 0
    for source in tensor.parts:
        last = first + source.shape[axis]
        inside = range(max(part.start, first) - first, min(part.stop, last) - first)
        if inside:
            found.append(narrowed(source, axis, inside))
        first = last
    return found[0] if len(found) == 1 else Concat(found, axis)


@_narrowed.register
def _(tensor: Stack, axis: int, part: range) -> LazyTensor:
    if axis == 0:
        return Stack(tensor.parts[part.start : part.stop])
    return Stack([narrowed(source, axis - 1, part) for source in tensor.parts])


@_narrowed.register
def _(tensor: Scaled, axis: int, part: range) -> LazyTensor:
    shared = tensor.scale.shape[axis] == 1
    return Scaled(narrowed(tensor.source, axis, part), tensor.scale if shared else narrowed(tensor.scale, axis, part))


def _resized(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])
