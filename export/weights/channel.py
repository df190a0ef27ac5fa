"""Eight-bit weights with one scale per output channel, made while they are written.

    s[n] = max_k |w[k, n]| / 127        q[k, n] = round(w[k, n] / s[n]) + 128        uint8 [K, N], zero at 128

One scale for the whole channel lets the product run as one integer matrix product, the fastest that a CPU has, from a
single packed copy that serves a prompt and a token alike. It is also coarser than a scale per block: weights and
activations are rotated first, so that no input stands out (``model/checkpoint/rotated.py`` and
``export/passes/quantize/rotate_hidden.py``).

Codes are unsigned because ONNX Runtime's product of unsigned and signed bytes adds pairs in 16 bits that saturate on a
CPU without VNNI instructions; its product of unsigned bytes is exact there, and the same kernel where there is VNNI.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from .stream import channels_of, chunk_rows, regrouped, transposed, write_all, write_channels

Array = np.ndarray[Any, Any]

ZERO = 128
"""The code of 0."""


class ChannelCodes(ir.LazyTensor):
    """The codes of a weight [K, N], uint8 [K, N].

    Args:
        source: the weight.
        centered: scales are rounded to bfloat16, before codes are chosen by them.
    """

    def __init__(self, source: ir.TensorProtocol, *, centered: bool = False) -> None:
        self.source, self.centered = source, centered
        self.inputs, self.channels_count = source.shape.numpy()
        self._scales: Array | None = None
        super().__init__(
            lambda: ir.Tensor(np.ascontiguousarray(np.concatenate(list(self.channels())).T)),
            dtype=ir.DataType.UINT8, shape=ir.Shape((self.inputs, self.channels_count)),
        )

    def channels(self) -> Iterator[Array]:
        """Codes by output channel, a few at a time: uint8 [n, K] in order."""
        found = []
        for rows_NK in regrouped(channels_of(self.source), chunk_rows(self.inputs)):
            scales_N = channel_scales(rows_NK)
            if self.centered:
                scales_N = torch.from_numpy(scales_N).bfloat16().float().numpy()
            found.append(scales_N)
            yield (np.rint(rows_NK / scales_N[:, None]).clip(-127, 127) + ZERO).astype(np.uint8)
        self._scales = np.concatenate(found)

    def scales(self) -> Array:
        """float32 [N]; reads the weight unless its codes have been written."""
        if self._scales is None:
            for _ in self.channels():
                pass
        assert self._scales is not None
        return self._scales

    def write_to(self, file: int, offset: int) -> None:
        """Write the codes at ``offset`` of an open file descriptor."""
        write_channels(file, self.channels(), offset, width=self.channels_count)


class ChannelScales(ir.LazyTensor):
    """The scales that belong to ``ChannelCodes``, float32 [N]."""

    def __init__(self, codes: ChannelCodes) -> None:
        shape = ir.Shape((codes.channels_count,))
        super().__init__(lambda: ir.Tensor(codes.scales()), dtype=ir.DataType.FLOAT, shape=shape)


class RowCodes(ir.LazyTensor):
    """The codes of a table [V, D] whose rows are looked up, less 128: int8 [V, D], a scale per row."""

    def __init__(self, table: ir.TensorProtocol) -> None:
        self.codes = ChannelCodes(transposed(table))
        super().__init__(lambda: ir.Tensor(np.concatenate(list(self._rows()))), dtype=ir.DataType.INT8,
                         shape=ir.Shape(table.shape.numpy()))

    def _rows(self) -> Iterator[Array]:
        for rows_ND in self.codes.channels():
            yield (rows_ND ^ ZERO).view(np.int8)

    def write_to(self, file: int, offset: int) -> None:
        """Write the codes at ``offset`` of an open file descriptor."""
        for rows_ND in self._rows():
            write_all(file, rows_ND, offset)
            offset += rows_ND.nbytes


class RowScales(ir.LazyTensor):
    """The scales that belong to ``RowCodes``, float32 [V, 1]."""

    def __init__(self, codes: RowCodes) -> None:
        super().__init__(lambda: ir.Tensor(codes.codes.scales()[:, None]), dtype=ir.DataType.FLOAT,
                         shape=ir.Shape((codes.codes.channels_count, 1)))


def channel_scales(rows_NK: Array) -> Array:
    """The scale that maps a channel's largest magnitude to 127; 1 for a channel of zeros, or of numbers so small that
    the scale would lose its own precision.
    """
    scale_N = np.abs(rows_NK).max(axis=1) / 127
    return np.where(scale_N >= np.finfo(np.float32).tiny, scale_N, 1.0).astype(np.float32)
