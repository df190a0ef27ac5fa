"""Float32 weights rounded to 16 bits while they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...errors import HerdError
from .experts import ExpertRows, Stacked
from .origin import origin_of, with_origin
from .stream import ChannelIterable, Weight, channels_of, chunk_rows, regrouped, write_all, write_channels
from .writer import Part

Array = np.ndarray[Any, Any]

TYPES = {ir.DataType.BFLOAT16: torch.bfloat16, ir.DataType.FLOAT16: torch.float16}
"""The 16-bit types."""


class Rounded(ir.LazyTensor):
    """A float32 initializer rounded to a 16-bit type while it is written, block by block.

    Args:
        source: any initializer; weights of a checkpoint are not read before they are written.
        dtype: ``BFLOAT16`` or ``FLOAT16``.
    """

    def __init__(self, source: ir.TensorProtocol, dtype: ir.DataType) -> None:
        self.source = source
        shape = ir.Shape(source.shape.numpy())
        super().__init__(
            lambda: ir.Tensor(self._rounded(source.numpy()).view(dtype.numpy()), dtype=dtype),
            dtype=dtype, shape=shape, name=source.name,
        )
        with_origin(self, origin_of(source))

    def divided(self) -> Sequence[Part]:
        """The experts of a mixture, which are rounded side by side; everything else at once."""
        if not isinstance(self.source, Stacked):
            return [self]
        return [ExpertRows(partial(self._rows, matrix), matrix.nbytes // 2) for matrix in self.source.matrices]

    def write_to(self, file: int, offset: int) -> None:
        """Write little-endian values at ``offset`` of an open file descriptor.

        Raises:
            HerdError: a value is larger than any of the type.
        """
        if isinstance(self.source, Weight) and not self.source.is_transposed:
            for start, block in self.source.blocks():
                write_all(file, self._rounded(block), offset + start * block[0].nbytes // 2)
        elif isinstance(self.source, ChannelIterable):
            rows = (self._rounded(rows_NK) for rows_NK in self.source.channels())
            write_channels(file, rows, offset, width=int(self.shape.numpy()[1]))
        else:
            write_all(file, self._rounded(self.source.numpy()), offset)

    def _rows(self, matrix: ir.TensorProtocol) -> Iterator[Array]:
        return map(self._rounded, regrouped(channels_of(matrix), chunk_rows(matrix.shape.numpy()[0])))

    def _rounded(self, values: Array) -> Array:
        """The bits of values that all have a place in the type: larger ones would become infinities."""
        most = torch.finfo(TYPES[self.dtype]).max
        largest = max(float(values.max()), -float(values.min())) if values.size else 0.0
        if largest > most:
            raise HerdError(f"{origin_of(self).name} holds {largest:g}, {self.dtype.name.lower()} ends at {most:g}: "
                            "build for a target or with a recipe that keeps it in float32")
        return rounded(values, self.dtype)


def rounded(values: Array, dtype: ir.DataType) -> Array:
    """The bits of float32 values in a 16-bit type, to nearest even: int16 in the same order."""
    found = torch.from_numpy(np.ascontiguousarray(values)).to(TYPES[dtype])
    bits: Array = found.view(torch.int16).numpy()
    return bits
