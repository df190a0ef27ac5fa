"""Tensors in files that are read when somebody asks, and only as much of them as was asked for."""

from __future__ import annotations

import ctypes
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ....errors import HerdError

Index = int | slice | None
"""What to read of the first axis: one entry, a range without a step, or everything."""

_MADV_DONTNEED: int | None = getattr(mmap, "MADV_DONTNEED", None)
"""None where the system has no such advice."""


class LazyTensor(Protocol):
    """A shape, a type, and a way to read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of what ``read`` gives."""

    def read(self, index: Index = None) -> Tensor:
        """The whole tensor or a part of its first axis, in memory of its own."""


def bounds(index: slice | None, length: int) -> tuple[int, int]:
    """First and last (exclusive) entry that a range selects of an axis."""
    begin, end, step = (index or slice(None)).indices(length)
    if step != 1:
        raise ValueError(f"ranges of tensors are read without a step, found {step}")
    return begin, max(begin, end)


@dataclass(frozen=True)
class FileTensor:
    """A tensor at a place in a file, row-major and little-endian.

    It is read, not mapped: mapped pages would count as this process's memory, and a mapping as large as a shard can
    be refused on a machine with less memory than that.

    Attributes:
        path: the file.
        offset: first byte of the tensor.
        shape: of the whole tensor.
        dtype: as stored.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, index: Index = None) -> Tensor:
        """Read the bytes of the wanted part.

        Raises:
            HerdError: the file has become shorter since it was opened.
        """
        if isinstance(index, int):
            return self.read(slice(index, index + 1))[0]
        if not self.shape:
            return self._values(0, ())
        begin, end = bounds(index, self.shape[0])
        return self._values(begin, (end - begin, *self.shape[1:]))

    def _values(self, first: int, shape: tuple[int, ...]) -> Tensor:
        offset = self.offset + first * math.prod(self.shape[1:]) * self.dtype.itemsize
        count = math.prod(shape) * self.dtype.itemsize
        data = np.fromfile(self.path, np.uint8, count, offset=offset)
        if len(data) != count:
            raise HerdError(f"{self.path} became shorter while it was read: is something writing to it?")
        return torch.from_numpy(data).view(self.dtype).view(shape)


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of a memory-mapped ``.pth`` file.

    Pages are given back after each read, so that a large checkpoint does not stay resident.

    Attributes:
        value: backed by the mapping, which ends with the last tensor of its file.
    """

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
        part = self.value if index is None else self.value[index]
        copy = part.clone()
        _release(part)
        return copy


def _release(part: Tensor) -> None:
    """Tell the system that a mapped part is not needed; the file still has it. Advice: a refusal does no harm."""
    if _MADV_DONTNEED is None:
        return
    if not part.numel():
        return
    span = 1 + sum((size - 1) * step for size, step in zip(part.shape, part.stride(), strict=True))
    first = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = part.data_ptr() + span * part.itemsize - first
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_DONTNEED)
