"""MatmulBackend that look at their inputs: histograms of magnitudes for FP8, second moments for 4-bit weights."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..model.quantization.calibration_file import CENTRE, KV_AMAX
from ..model.quantization.formats import Fp8Format
from ..model.quantization.recipes import Recipe
from .hessian import Moments
from .histogram import Histogram
from .matmul_backends import require_finite
from .observers import OBSERVERS

SMALLEST = 2.0**-48
"""Magnitudes up to here are as good as zero: the lowest that a histogram tells apart."""


class CalibrationObserver:
    """Exact products whose inputs are recorded as a recipe wants; a ``MatmulBackend``.

    Args:
        recipe: weights in FP8 want histograms of their inputs, weights in 4 bits second moments, caches in 8 bits the
            largest keys and values.
        experts: experts of a layer.
    """

    def __init__(self, recipe: Recipe, experts: int) -> None:
        self.recipe, self.experts = recipe, experts
        self.histograms: dict[str, list[Histogram]] = {}
        """By the name of a weight; one, or one per expert. Weights that meet the same input share one."""
        self.centres: dict[str, Tensor] = {}
        """What is subtracted from the input of a weight, [K]: the median of each channel in the first call's rows."""
        self.caches: dict[str, tuple[Histogram, Histogram]] = {}
        self.moments = Moments()
        self._last: tuple[Tensor, str] | None = None

    def __call__(self, name: str, x: Tensor, weight_KN: Tensor, expert: int | None = None) -> Tensor:
        """Record x and multiply.

        Raises:
            HerdError: x holds a NaN or an infinity.
        """
        layout = self.recipe.layout_of(name)
        require_finite(x, f"the input of {name}" + (f", expert {expert}," if expert is not None else ""))
        if isinstance(layout, Fp8Format):
            self._record(name, x, expert)
        elif getattr(layout, "bits", 8) == 4 and name.startswith("layers."):
            self.moments.add(name, x, expert=expert, experts=self.experts)
        return x @ weight_KN

    def _record(self, name: str, x: Tensor, expert: int | None) -> None:
        if expert is not None:
            if name not in self.histograms:
                self.histograms[name] = [Histogram() for _ in range(self.experts)]
            self.histograms[name][expert].add(x)
            return
        if self._last is not None and self._last[0] is x:  # gate and up, or q, k and v, read one tensor
            first = self._last[1]
            self.histograms[name], self.centres[name] = self.histograms[first], self.centres[first]
            return
        if name not in self.centres:
            self.centres[name] = x.reshape(-1, x.shape[-1]).median(0).values
        self.histograms.setdefault(name, [Histogram()])[0].add(x - self.centres[name])
        self._last = x, name

    def cached(self, name: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Record keys and values."""
        for histogram, x in zip(self.caches.setdefault(name, (Histogram(), Histogram())), (key, value), strict=True):
            histogram.add(x)
        return key, value

    def amaxes(self) -> dict[str, Tensor]:
        """``<observer>/<name>`` to the largest magnitudes to represent, and ``centre/<name>``, as they are stored."""

        @cache
        def chosen(observer: str, histogram: Histogram) -> float:
            return OBSERVERS[observer](histogram)

        found = {f"{CENTRE}/{name}": centre.clone() for name, centre in self.centres.items()}
        for observer in OBSERVERS:
            for name, histograms in self.histograms.items():
                amax = without_zeros(torch.tensor([chosen(observer, histogram) for histogram in histograms]))
                found[f"{observer}/{name}"] = amax[0] if name in self.centres else amax  # experts have no centre
            for name, pair in self.caches.items():
                amax = torch.tensor([chosen(observer, histogram) for histogram in pair])
                found[f"{observer}/{name}.{KV_AMAX}"] = without_zeros(amax)
        return found


def without_zeros(amax: Tensor) -> Tensor:
    """Replace what cannot be divided by: an expert that saw only zeros takes the largest of its layer, or 1."""
    usable = amax > SMALLEST
    return torch.where(usable, amax, amax.max() if usable.any() else 1.0)
