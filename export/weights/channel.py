"""Eight-bit weights with one scale per output channel, made while they are written.

    s[n] = max_k |w[k, n]| / 127        q[k, n] = round(w[k, n] / s[n]) + 128        uint8 [K, N], zero at 128

One scale for the whole channel lets the product run as one integer matrix product, the fastest that a CPU has, from a
single packed copy that serves a prompt and a token alike. It is also coarser than a scale per block: weights and
activations are rotated first, so that no input stands out (``model/checkpoint/rotated.py`` and
``export/passes/quantize/rotate_hidden.py``).

With the Hessian of the inputs, rounding also makes up for its own errors (``gptq.py``).

Codes are unsigned because ONNX Runtime's product of unsigned and signed bytes adds pairs in 16 bits that saturate on a
CPU without VNNI instructions; its product of unsigned bytes is exact there, and the same kernel where there is VNNI.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...model.quantization.packed_sizes import filled
from .block import GPTQ_ROWS, Hessian, filled_up, inverse_cholesky_of
from .gptq import CHANNEL_BLOCK, KnownScales, gptq_quantize
from .stream import channels_of, chunk_rows, regrouped, transposed, write_all, write_channels

Array = np.ndarray[Any, Any]

ZERO = 128
"""The code of 0."""


class ChannelRounder(KnownScales):
    """Rounds weights to 8 bits by scales that are known."""

    def round(self, blocks: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Nearest codes from -127 to 127 as float32, ties to even."""
        del zeros
        return (blocks / scales[:, None]).round_().clamp_(-127, 127)


def round_channels(rows_NK: Array, factor_KK: Tensor | None = None, *, centered: bool = False) -> tuple[Array, Array]:
    """Codes uint8 [N, K] and scales float32 [N] of output channels.

    Args:
        rows_NK: float32.
        factor_KK: ``gptq.inverse_hessian_cholesky`` of the inputs, filled up to whole blocks; None to round to nearest.
        centered: scales are rounded to bfloat16, before codes are chosen by them.
    """
    scales_N = channel_scales(rows_NK)
    if centered:
        scales_N = torch.from_numpy(scales_N).bfloat16().float().numpy()
    if factor_KK is None:
        codes_NK = np.rint(rows_NK / scales_N[:, None]).clip(-127, 127)
    else:
        weight_KN = torch.from_numpy(filled_up(rows_NK, CHANNEL_BLOCK)).T.contiguous()
        codes_bKN, _, _ = gptq_quantize(weight_KN, factor_KK, ChannelRounder(torch.from_numpy(scales_N)))
        codes_NK = codes_bKN.flatten(0, 1)[: rows_NK.shape[1]].T.contiguous().numpy()
    return (codes_NK + ZERO).astype(np.uint8), scales_N


class ChannelCodes(ir.LazyTensor):
    """The codes of a weight [K, N], uint8 [K, N].

    Args:
        source: the weight.
        hessian: of the inputs, None to round to nearest.
        centered: scales are rounded to bfloat16, before codes are chosen by them.
    """

    def __init__(self, source: ir.TensorProtocol, hessian: Hessian | None = None, *, centered: bool = False) -> None:
        self.source, self._hessian, self.centered = source, hessian, centered
        self.inputs, self.channels_count = source.shape.numpy()
        self._scales: Array | None = None
        super().__init__(
            lambda: ir.Tensor(np.ascontiguousarray(np.concatenate(list(self.channels())).T)),
            dtype=ir.DataType.UINT8, shape=ir.Shape((self.inputs, self.channels_count)),
        )

    def channels(self) -> Iterator[Array]:
        """Codes by output channel, a few at a time: uint8 [n, K] in order."""
        found = []
        factor_KK = inverse_cholesky_of(self.source, self._hessian, filled(self.inputs, CHANNEL_BLOCK))
        most = chunk_rows(self.inputs) if factor_KK is None else GPTQ_ROWS
        for rows_NK in regrouped(channels_of(self.source), most):
            codes_NK, scales_N = round_channels(rows_NK, factor_KK, centered=self.centered)
            found.append(scales_N)
            yield codes_NK
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
