"""Observers: which magnitude of an input its FP8 scale should map to 448. Each reads one histogram of magnitudes.

===========  ==============================================================================================
max          the largest value: nothing is clipped
percentile   the magnitude below which all but one in 100,000 of the values other than 0 lie
mse          the candidate with the least mean square error of rounding and clipping
entropy      the candidate whose rounded distribution diverges least (KL) from the histogram (Migacz 2017)
===========  ==============================================================================================

E4M3 spends the same relative precision on every octave down to 2^-6 and loses it below, so clipping buys little where
an integer format gains much: a smaller scale only lifts the smallest values out of the subnormals and moves where the
steps fall. Candidates lie between the largest value and a 32nd of it, eight in an octave.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..model.quantization.e4m3 import E4M3_MAX, to_e4m3
from ..model.quantization.observers import Observer
from .histogram import Histogram, bin_centers, edges

PERCENTILE = 0.99999
_OCTAVES, _PER_OCTAVE = 5, 8


def maximum(histogram: Histogram) -> float:
    """The largest magnitude."""
    return histogram.amax


def percentile(histogram: Histogram) -> float:
    """The upper edge of the bin that holds the 99.999th percentile of all values but zeros, which any scale holds."""
    below = histogram.counts.cumsum(0)
    wanted = torch.tensor(PERCENTILE * int(below[-1]), dtype=torch.float64)
    return min(histogram.amax, float(edges()[1:][int(torch.searchsorted(below.double(), wanted))]))


def mean_square(histogram: Histogram) -> float:
    """The candidate with the least mean square error."""
    values, counts = _occupied(histogram)
    return min(_candidates(histogram),
               key=lambda amax: float((counts * (_rounded(values, amax).double() - values).square()).sum()))


def entropy(histogram: Histogram) -> float:
    """The candidate with the least KL of the clipped histogram against what rounding leaves of the unclipped part.

    As for integers (Migacz 2017): what lies beyond the candidate counts to the last bin of the first distribution, and
    not at all in the second, where values that round to one code share its probability evenly over their bins.
    """
    values, counts = _occupied(histogram)

    def divergence(amax: float) -> float:
        inside = int((values <= amax).sum())
        if inside == 0:
            return torch.inf
        p = counts[:inside].clone()
        p[-1] += counts[inside:].sum()
        _, code = torch.unique(_rounded(values[:inside], amax), return_inverse=True)
        mass = torch.zeros(int(code.max()) + 1, dtype=torch.float64).index_add(0, code, counts[:inside])
        bins = torch.zeros_like(mass).index_add(0, code, torch.ones_like(p))
        q = (mass / bins)[code]
        return float((p / p.sum() * (p / p.sum() / (q / q.sum())).log()).sum())

    return min(_candidates(histogram), key=divergence)


ESTIMATORS: dict[Observer, Callable[[Histogram], float]] = {
    "max": maximum, "percentile": percentile, "mse": mean_square, "entropy": entropy,
}


def _candidates(histogram: Histogram) -> list[float]:
    return [histogram.amax * 2.0 ** (-step / _PER_OCTAVE) for step in range(_OCTAVES * _PER_OCTAVE + 1)]


def _occupied(histogram: Histogram) -> tuple[Tensor, Tensor]:
    """Centers of the bins that hold something, and their counts: float64 [n] each."""
    found = histogram.counts > 0
    return bin_centers()[found].clamp(max=histogram.amax).double(), histogram.counts[found].double()


def _rounded(values: Tensor, amax: float) -> Tensor:
    scale = amax / E4M3_MAX
    return to_e4m3(values.float() / scale).float() * scale
