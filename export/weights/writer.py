"""The writer of initializers: places are known before anything is written, and every core writes a part of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import numpy as np
import onnx_ir as ir

from .origin import origin_of, with_origin
from .parallel import in_parallel
from .stream import StreamWritable, write_all

ALIGNMENT = 4096
"""Weights start on page boundaries, so that a runtime can map and drop them one by one."""
INLINE_BYTES = 1024
"""Tensors up to this size stay inside of the ONNX file."""


class Part(Protocol):
    """Some of the bytes of an initializer, one after the other in the file."""

    @property
    def nbytes(self) -> int:
        """How many."""

    def write_to(self, file: int, offset: int) -> None:
        """Write them at ``offset`` of an open file descriptor."""


@runtime_checkable
class Divisible(Protocol):
    """An initializer whose parts can be written side by side."""

    def divided(self) -> Sequence[Part]:
        """All of it, in the order of the file."""


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
    found: dict[int, list[ir.Value]] = {}
    for value in initializers(model):
        if value.const_value is not None:
            found.setdefault(id(value.const_value), []).append(value)
    groups = _groups(values[0].const_value for values in found.values())
    end = max((offset + tensor.nbytes for group in groups for tensor, offset in group), default=0)
    with (directory / data_name).open("wb") as file:
        for group in _written(groups, file.fileno(), on_bytes):
            for tensor, offset in group:
                values = found[id(tensor)]
                external = with_origin(ir.ExternalTensor(
                    data_name, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()),
                    name=str(values[0].name), base_dir=directory,
                ), origin_of(tensor))
                for value in values:
                    value.const_value = external
        file.truncate(end)
    for value in initializers(model):
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.tobytes()  # read once here, where an error is told as it is; saving wraps it in its own


_Placed = tuple[ir.TensorProtocol, int]
"""A tensor and its offset."""


def _groups(tensors: Iterable[ir.TensorProtocol | None]) -> list[list[_Placed]]:
    """Large tensors with their offsets. What a stream finds on the way, such as scales, lies behind it in its group."""
    groups: list[list[_Placed]] = []
    end = 0
    for tensor in tensors:
        if tensor is not None and tensor.nbytes > INLINE_BYTES:
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            end = offset + tensor.nbytes
            if isinstance(tensor, StreamWritable) or not groups:
                groups.append([])
            groups[-1].append((tensor, offset))
    return groups


def _written(groups: list[list[_Placed]], file: int, on_bytes: Callable[[int], None]) -> Iterator[list[_Placed]]:
    """Groups in the order in which they are written: the parts of their first tensors side by side, then the rest.

    The largest parts are begun first, so that no core is left alone with one at the end.
    """
    parts = [(part, offset, index) for index, group in enumerate(groups) for part, offset in _parts_of(*group[0])]
    left = Counter(index for *_, index in parts)
    parts.sort(key=lambda part: part[0].nbytes)
    jobs = (partial(_write_part, *parts.pop(), file) for _ in range(len(parts)))  # what is written is not held
    for index, nbytes in in_parallel(jobs):
        on_bytes(nbytes)
        left[index] -= 1
        if not left[index]:
            for tensor, offset in groups[index][1:]:
                write_all(file, np.frombuffer(tensor.tobytes(), np.uint8), offset)
                on_bytes(tensor.nbytes)
            yield groups[index]
            groups[index].clear()


def _parts_of(tensor: ir.TensorProtocol, offset: int) -> Iterator[tuple[Part, int]]:
    if not isinstance(tensor, StreamWritable):
        yield _Whole(tensor), offset
        return
    for part in tensor.divided() if isinstance(tensor, Divisible) else [cast(Part, tensor)]:
        yield part, offset
        offset += part.nbytes


@dataclass(frozen=True)
class _Whole:
    """A tensor that is written at once."""

    tensor: ir.TensorProtocol

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def write_to(self, file: int, offset: int) -> None:
        write_all(file, np.frombuffer(self.tensor.tobytes(), np.uint8), offset)


def _write_part(part: Part, offset: int, index: int, file: int) -> tuple[int, int]:
    part.write_to(file, offset)
    return index, part.nbytes
