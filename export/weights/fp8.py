"""FP8 weights: E4M3 codes with a scale in two levels, made while they are written.

    s[n] = max_k |w[k, n]| / 448, rounded up to bfloat16        one scale per output channel n
    g = the smallest power of two not below any s[n]            one for the whole tensor
    r[n] = s[n] / g <= 1,   q[k, n] = E4M3(w[k, n] / s[n]),     w[k, n] ~ g · r[n] · q[k, n]

A TensorRT product is FP8 x FP8 and safe from overflow only when a *scalar* g dequantises its weight; a scale per
channel at that place makes it store raw sums of codes, which float16 cannot hold, and a scale per expert makes it
compute in 16 bits. So the ratios r follow the product as an ordinary multiplication. They are exact in bfloat16 by
construction: the engine's arithmetic and its float32 twin multiply by the same numbers.

With the Hessians of its inputs, the codes also make up for each other's errors (``gptq.py``), and s is the best of a
few scales within an octave: E4M3 has the same numbers in every octave, so what is left to choose is where a channel's
weights fall between them.

Weights of outlier channels (``model/quantization/outliers.py``) are 0 among the codes, and themselves beside them.

E4M3 itself, and why its scales are bfloat16 numbers: ``model/quantization/e4m3.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...model.quantization.e4m3 import channel_scales, power_of_two, rounded_up, to_e4m3
from ...model.quantization.packed_sizes import filled
from .block import GPTQ_ROWS, filled_up, inverse_cholesky_of
from .gptq import CHANNEL_BLOCK, KnownScales, gptq_quantize
from .origin import origin_of
from .stream import channels_of, chunk_rows, expert_of, regrouped, write_channels

Array = np.ndarray[Any, Any]
HessianOf = Callable[[int | None], Tensor | None]
"""The Hessian [K, K] of the inputs of an expert, or of the weight itself; None to round to nearest."""

STEPS = 4
"""Scales within an octave that are tried."""


class E4m3Rounder(KnownScales):
    """Rounds weights to E4M3 by scales that are known."""

    def round(self, blocks: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest E4M3 numbers as float32."""
        del zeros
        return to_e4m3(blocks / scales[:, None]).float()


@dataclass
class _Found:
    """What rounding a weight finds beside its codes, output channels one after the other, expert by expert.

    Attributes:
        scales: pieces [n].
        outliers: pieces [n, J] of the weights of outlier channels.
    """

    scales: list[Array] = field(default_factory=list)
    outliers: list[Array] = field(default_factory=list)


class Fp8Codes(ir.LazyTensor):
    """The codes of a weight [K, N], or of experts [E, K, N], streamed; writing or reading them finds all else.

    Args:
        source: the weight.
        hessian_of: Hessians of its inputs.
        outliers_J: outlier channels of its input, None for none.
    """

    def __init__(
        self, source: ir.TensorProtocol, hessian_of: HessianOf = lambda _: None, outliers_J: Tensor | None = None
    ) -> None:
        self.source, self._hessian_of, self.outliers_J = source, hessian_of, outliers_J
        self._found: _Found | None = None
        super().__init__(self._whole, dtype=ir.DataType.FLOAT8E4M3FN, shape=ir.Shape(source.shape.numpy()))

    def _matrices(self) -> Iterator[ir.TensorProtocol]:
        """The weight itself, or that of each expert."""
        shape = self.source.shape.numpy()
        yield from (expert_of(self.source, expert) for expert in range(shape[0])) if len(shape) == 3 else [self.source]

    def _codes(self) -> Iterator[Iterator[Array]]:
        """Codes of each matrix by output channel, a few at a time."""
        found = _Found()
        for matrix in self._matrices():
            yield self._channels(matrix, found)
        self._found = found

    def _channels(self, matrix: ir.TensorProtocol, found: _Found) -> Iterator[Array]:
        inputs = int(matrix.shape.numpy()[0])
        factor_KK = inverse_cholesky_of(matrix, partial(self._hessian, matrix), filled(inputs, CHANNEL_BLOCK))
        for rows_NK in regrouped(channels_of(matrix), chunk_rows(inputs) if factor_KK is None else GPTQ_ROWS):
            rows, outliers_NJ = self._apart(torch.from_numpy(rows_NK))
            scales = channel_scales(rows) if factor_KK is None else _best_scales(rows, factor_KK)
            found.scales.append(scales.numpy())
            if outliers_NJ is not None:
                found.outliers.append(outliers_NJ.numpy())
            yield to_e4m3(_rounded(rows, scales, factor_KK)).view(torch.uint8).numpy()

    def _hessian(self, matrix: ir.TensorProtocol) -> Tensor | None:
        """The Hessian of a matrix's inputs, outlier channels as if they were never seen: they take over no errors."""
        found_KK = self._hessian_of(origin_of(matrix).expert)
        if found_KK is None or self.outliers_J is None:
            return found_KK
        return found_KK.index_fill(0, self.outliers_J, 0.0).index_fill_(1, self.outliers_J, 0.0)

    def _apart(self, rows_NK: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights with zeros where outlier channels are, and the weights of those [N, J]."""
        if self.outliers_J is None:
            return rows_NK, None
        return rows_NK.index_fill(1, self.outliers_J, 0.0), rows_NK[:, self.outliers_J]

    def _all_found(self) -> _Found:
        """Read the weight, unless its codes have been written."""
        if self._found is None:
            for channels in self._codes():
                for _ in channels:
                    pass
        assert self._found is not None
        return self._found

    def scales(self) -> Array:
        """float32 [N] or [E, N]; reads the weight unless its codes have been written."""
        shape = self.source.shape.numpy()
        return np.concatenate(self._all_found().scales).reshape(*shape[:-2], shape[-1])

    def outlier_weights(self) -> Array:
        """The weights of outlier channels, float32 [J, N] or [E, J, N]; reads the weight as ``scales`` does.

        They are handed over, not kept: those of 128 experts of all layers are gigabytes. Asked again, it reads again.
        """
        if self._found is not None and not self._found.outliers:
            self._found = None
        found, shape = self._all_found(), self.source.shape.numpy()
        pieces, found.outliers = found.outliers, []
        found_NJ = np.concatenate(pieces).reshape(*shape[:-2], shape[-1], -1)
        return np.ascontiguousarray(found_NJ.swapaxes(-1, -2))

    def global_scale(self) -> float:
        """The scale g."""
        return power_of_two(float(self.scales().max()))

    def _whole(self) -> ir.TensorProtocol:
        codes = [np.concatenate(list(channels)).T for channels in self._codes()]
        values = np.ascontiguousarray(np.stack(codes) if len(self.source.shape) == 3 else codes[0])
        return ir.Tensor(values.view(ir.DataType.FLOAT8E4M3FN.numpy()), dtype=ir.DataType.FLOAT8E4M3FN)

    def write_to(self, file: int, offset: int) -> None:
        """Write the codes at ``offset`` of an open file descriptor."""
        inputs, width = self.source.shape.numpy()[-2:]
        for channels in self._codes():
            write_channels(file, channels, offset, width=width)
            offset += inputs * width


def _best_scales(rows_NK: Tensor, factor_KK: Tensor) -> Tensor:
    """The scales [N] with the least square error, inputs weighted as GPTQ weighs them."""
    importance_K = factor_KK.diagonal()[: rows_NK.shape[1]].square().reciprocal()
    smallest_N = channel_scales(rows_NK)
    candidates = torch.stack([rounded_up(smallest_N * 2 ** (step / STEPS)) for step in range(STEPS)])
    errors = [(to_e4m3(rows_NK / scales_N[:, None]).float() * scales_N[:, None] - rows_NK).square_() @ importance_K
              for scales_N in candidates]
    return candidates.gather(0, torch.stack(errors).argmin(0)[None])[0]


def _rounded(rows_NK: Tensor, scales_N: Tensor, factor_KK: Tensor | None) -> Tensor:
    """Rows as multiples of their scales: E4M3 numbers by GPTQ, or as they are to be rounded to nearest."""
    if factor_KK is None:
        return rows_NK / scales_N[:, None]
    weight_KN = torch.from_numpy(filled_up(rows_NK.numpy(), CHANNEL_BLOCK)).T.contiguous()
    codes_bKN, _, _ = gptq_quantize(weight_KN, factor_KK, E4m3Rounder(scales_N))
    return codes_bKN.flatten(0, 1)[: rows_NK.shape[1]].T.contiguous()


class GlobalScale(ir.LazyTensor):
    """The scale g of ``Fp8Codes``, a float32 scalar."""

    def __init__(self, codes: Fp8Codes) -> None:
        super().__init__(lambda: ir.Tensor(np.asarray(codes.global_scale(), np.float32)), dtype=ir.DataType.FLOAT,
                         shape=ir.Shape(()))


class ChannelRatios(ir.LazyTensor):
    """What follows the product: the ratios r of ``Fp8Codes``, divided by what the inputs of experts were multiplied by.

    float32 [1, N] or [E, 1, N].

    Args:
        codes: of a weight or of experts.
        multipliers_E: input multipliers of experts, powers of two, see ``passes/quantize/fp8.py``; None for none.
    """

    def __init__(self, codes: Fp8Codes, multipliers_E: Array | None = None) -> None:
        self.codes, self.multipliers_E = codes, multipliers_E
        *experts, _, width = codes.source.shape.numpy()
        super().__init__(self._values, dtype=ir.DataType.FLOAT, shape=ir.Shape((*experts, 1, width)))

    def _values(self) -> ir.TensorProtocol:
        ratios = self.codes.scales() / np.float32(self.codes.global_scale())
        if self.multipliers_E is not None:
            ratios = ratios / self.multipliers_E[:, None]
        return ir.Tensor(np.ascontiguousarray(ratios[..., None, :].astype(np.float32)))


class OutlierWeights(ir.LazyTensor):
    """The weights of outlier channels that belong to ``Fp8Codes``, float32 [J, N] or [E, J, N]."""

    def __init__(self, codes: Fp8Codes) -> None:
        assert codes.outliers_J is not None
        *experts, _, width = codes.source.shape.numpy()
        super().__init__(lambda: ir.Tensor(codes.outlier_weights()), dtype=ir.DataType.FLOAT,
                         shape=ir.Shape((*experts, len(codes.outliers_J), width)))
