"""Histograms of magnitudes over all of float32's range, without knowing any range beforehand.

The bin of a magnitude is made of its own bits: the exponent and the six highest bits of the mantissa, so that there are
64 bins in every octave and none is wider than 1.6 % of its value, a fourth of the finest E4M3 step. Counts are
integers: adding histograms gives the same in every order, on every machine. Everything an observer wants is read off
one histogram later.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SHIFT = 17
"""float32 has 23 bits of mantissa; six of them are kept."""
_LOWEST, _OCTAVES = 127 - 48, 80
"""From 2^-48 to 2^32: what lies outside counts to the first or the last bin."""
BINS = _OCTAVES << 6
_PIECE = 1 << 22
"""Values that are counted at a time: their bins take eight bytes each."""


def bins_of(x: Tensor) -> Tensor:
    """The bin of every magnitude, int64 of the same shape; values that are not 0 only."""
    bits = x.detach().float().abs().contiguous().view(torch.int32)
    return ((bits >> _SHIFT).long() - (_LOWEST << 6)).clamp(0, BINS - 1)


def edges() -> Tensor:
    """Lower edges of all bins, and the upper edge of the last: float32 [BINS + 1]."""
    return ((torch.arange(BINS + 1) + (_LOWEST << 6)).to(torch.int32) << _SHIFT).view(torch.float32)


def bin_centers() -> Tensor:
    """A value in the middle of each bin, float32 [BINS]."""
    bounds = edges()
    return (bounds[:-1] + bounds[1:]) / 2


class Histogram:
    """Counts of magnitudes.

    Attributes:
        counts: int64 [BINS], values other than 0.
        zeros: how many values were 0.
        amax: the largest magnitude, exactly.
        rows: how many rows were added.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.zeros, self.amax, self.rows = 0, 0.0, 0

    def add(self, x: Tensor) -> None:
        """Take in every element of x [..., K], finite floats."""
        if not x.numel():
            return
        for values in x.reshape(-1).split(_PIECE):
            zeros = int((values == 0).sum())
            self.counts += torch.bincount(bins_of(values), minlength=BINS)
            self.counts[0] -= zeros
            self.zeros += zeros
            self.amax = max(self.amax, float(values.abs().max()))
        self.rows += x.shape[:-1].numel()

    @property
    def total(self) -> int:
        """Values that were added."""
        return int(self.counts.sum()) + self.zeros

    def share_beyond(self, amax: float) -> float:
        """Share of values in bins that lie wholly beyond a magnitude: what a scale of it clips."""
        beyond = int(self.counts[edges()[:-1] >= amax].sum())
        return beyond / self.total if self.total else 0.0
