"""Rounding to E4M3, and the scales that bring values into its range.

    s = amax / 448, rounded up to bfloat16        q = E4M3(x / s)        x ~ s · q

A scale that is a bfloat16 number multiplies exactly the same in an engine and in its float32 twin. Experts of a layer
share the scalar scale s of their input; expert e whose largest input is smaller by more than a power of two p_e is
multiplied by p_e first, and divided by it after the product: exact, and its inputs use the whole range.

E4M3 (Micikevicius et al. 2022, "FP8 formats for deep learning") has no infinity; its largest value is 448. Values
beyond saturate here, because a cast alone may give NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

E4M3_MAX = 448.0
"""The largest E4M3 value."""


def to_e4m3(values: Tensor) -> Tensor:
    """Round float32 values to the nearest E4M3 number, ties to even, saturating at 448; the sign of zero is kept."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def channel_scales(rows: Tensor) -> Tensor:
    """Scales s of output channels, rows [..., K] to [...]; at least 2^-40, so that a channel of zeros sets nothing."""
    return rounded_up((rows.abs().amax(-1) / E4M3_MAX).clamp(min=2.0**-40))


def rounded_up(scales: Tensor) -> Tensor:
    """The next bfloat16 number that is not smaller, for positive finite float32 values."""
    bits = scales.float().contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def input_scale(amax: float) -> float:
    """The scale s that maps a largest magnitude to 448, rounded up to bfloat16."""
    return float(rounded_up(torch.tensor(amax / E4M3_MAX)))


def power_of_two(scale: float) -> float:
    """The smallest power of two that is not below a positive number."""
    mantissa, exponent = np.frexp(scale)
    return float(np.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent))


def expert_input_multipliers(amax_E: Tensor) -> np.ndarray[Any, Any]:
    """Powers of two p that bring each expert's largest input up towards the largest of all, float32 [E]."""
    return torch.exp2(torch.floor(torch.log2(amax_E.max().double() / amax_E.double()))).float().numpy()
