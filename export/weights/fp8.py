"""FP8 weights: E4M3 codes with a scale in two levels, made while they are written.

    s[n] = max_k |w[k, n]| / 448, rounded up to bfloat16        one scale per output channel n
    g = the smallest power of two not below any s[n]            one for the whole tensor
    r[n] = s[n] / g <= 1,   q[k, n] = E4M3(w[k, n] / s[n]),     w[k, n] ~ g · r[n] · q[k, n]

A TensorRT product is FP8 x FP8 and safe from overflow only when a *scalar* g dequantises its weight; a scale per
channel at that place makes it store raw sums of codes, which float16 cannot hold, and a scale per expert makes it
compute in 16 bits. So the ratios r follow the product as an ordinary multiplication. They are exact in bfloat16 by
construction: the engine's arithmetic and its float32 twin multiply by the same numbers.

E4M3 (Micikevicius et al. 2022, "FP8 formats for deep learning") has no infinity; its largest value is 448. Values
beyond saturate here, because a cast alone may give NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from .stream import channels_of, expert_of, write_channels

Array = np.ndarray[Any, Any]

LARGEST = 448.0
"""The largest E4M3 value."""


@dataclass(frozen=True)
class Fp8Format:
    """One byte per weight, a bfloat16 ratio per output channel and one scale per tensor."""

    def bytes_per_weight(self) -> float:
        """Ratios are a few bytes in thousands."""
        return 1.0


def to_e4m3(values: Tensor) -> Tensor:
    """Round float32 values to the nearest E4M3 number, ties to even, saturating at 448; the sign of zero is kept."""
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def channel_scales(rows: Tensor) -> Tensor:
    """The scales s of output channels, rows [..., K] to [...]; small for a channel of zeros, so that g ignores it."""
    return rounded_up((rows.abs().amax(-1) / LARGEST).clamp(min=2.0**-40))


def rounded_up(scales: Tensor) -> Tensor:
    """The next bfloat16 number that is not smaller, for positive finite float32 values."""
    bits = scales.float().contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def input_scale(amax: float) -> float:
    """The scale s that maps a largest magnitude to 448, rounded up to bfloat16 for the same reason as the ratios."""
    return float(rounded_up(torch.tensor(amax / LARGEST)))


def power_of_two(scale: float) -> float:
    """The smallest power of two that is not below a positive number."""
    mantissa, exponent = np.frexp(scale)
    return float(np.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent))


class Fp8Codes(ir.LazyTensor):
    """The codes of a weight [K, N], or of experts [E, K, N], streamed; writing or reading them finds their scales.

    Args:
        source: the weight.
        centre_K: what is subtracted from its input (``passes/quantize_fp8.py``), None for nothing.
    """

    def __init__(self, source: ir.TensorProtocol, centre_K: Tensor | None = None) -> None:
        self.source, self.centre_K = source, centre_K
        self._scales: Array | None = None
        self._offsets: Array | None = None
        super().__init__(self._whole, dtype=ir.DataType.FLOAT8E4M3FN, shape=ir.Shape(source.shape.numpy()))

    def _matrices(self) -> Iterator[ir.TensorProtocol]:
        """The weight itself, or that of each expert."""
        shape = self.source.shape.numpy()
        yield from (expert_of(self.source, expert) for expert in range(shape[0])) if len(shape) == 3 else [self.source]

    def _codes(self, found: list[Array], offsets: list[Array]) -> Iterator[Iterator[Array]]:
        """Codes of each matrix by output channel, a few at a time; what is found is appended to the lists."""
        for matrix in self._matrices():
            yield self._channels(matrix, found, offsets)
        shape = self.source.shape.numpy()
        self._scales = np.concatenate(found).reshape(*shape[:-2], shape[-1])
        self._offsets = np.concatenate(offsets) if offsets else None

    def _channels(self, matrix: ir.TensorProtocol, found: list[Array], offsets: list[Array]) -> Iterator[Array]:
        for rows_NK in channels_of(matrix):
            rows = torch.from_numpy(rows_NK)
            scales = channel_scales(rows)
            found.append(scales.numpy())
            if self.centre_K is not None:
                offsets.append((rows @ self.centre_K).numpy())
            yield to_e4m3(rows / scales[:, None]).view(torch.uint8).numpy()

    def _look(self) -> None:
        if self._scales is None:
            for channels in self._codes([], []):
                for _ in channels:
                    pass

    def scales(self) -> Array:
        """float32 [N] or [E, N]; reads the weight unless its codes have been written."""
        self._look()
        assert self._scales is not None
        return self._scales

    def offsets(self) -> Array:
        """The centre times the weight, float32 [N]; reads the weight as ``scales`` does."""
        self._look()
        assert self._offsets is not None, "a weight without a centre has no offsets"
        return self._offsets

    def global_scale(self) -> float:
        """The scale g."""
        return power_of_two(float(self.scales().max()))

    def _whole(self) -> ir.TensorProtocol:
        codes = [np.concatenate(list(channels)).T for channels in self._codes([], [])]
        values = np.ascontiguousarray(np.stack(codes) if len(self.source.shape) == 3 else codes[0])
        return ir.Tensor(values.view(ir.DataType.FLOAT8E4M3FN.numpy()), dtype=ir.DataType.FLOAT8E4M3FN)

    def write_to(self, file: int, offset: int) -> None:
        """Write the codes at ``offset`` of an open file descriptor."""
        inputs, width = self.source.shape.numpy()[-2:]
        for channels in self._codes([], []):
            write_channels(file, channels, offset, width=width)
            offset += inputs * width


class GlobalScale(ir.LazyTensor):
    """The scale g of ``Fp8Codes``, a float32 scalar."""

    def __init__(self, codes: Fp8Codes) -> None:
        super().__init__(lambda: ir.Tensor(np.asarray(codes.global_scale(), np.float32)), dtype=ir.DataType.FLOAT,
                         shape=ir.Shape(()))


class Ratios(ir.LazyTensor):
    """What follows the product: the ratios r of ``Fp8Codes``, divided by what its input was lifted by.

    Args:
        codes: of a weight or of experts.
        lift: powers of two [E], see ``passes/quantize_fp8.py``.

    float32 [1, N] or [E, 1, N].
    """

    def __init__(self, codes: Fp8Codes, lift: Array | None = None) -> None:
        self.codes, self.lift = codes, lift
        *experts, _, width = codes.source.shape.numpy()
        super().__init__(self._values, dtype=ir.DataType.FLOAT, shape=ir.Shape((*experts, 1, width)))

    def _values(self) -> ir.TensorProtocol:
        ratios = self.codes.scales() / np.float32(self.codes.global_scale())
        if self.lift is not None:
            ratios = ratios / self.lift[:, None]
        return ir.Tensor(np.ascontiguousarray(ratios[..., None, :].astype(np.float32)))


class Offsets(ir.LazyTensor):
    """What subtracting the centre took from the product of ``Fp8Codes``: c W, float32 [N]."""

    def __init__(self, codes: Fp8Codes) -> None:
        width = codes.source.shape.numpy()[-1]
        super().__init__(lambda: ir.Tensor(codes.offsets()), dtype=ir.DataType.FLOAT, shape=ir.Shape((width,)))
