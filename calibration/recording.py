"""A backend that records its inputs: histograms of magnitudes for FP8, Hessians for 4-bit weights."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..model.checkpoint.finite import SMALLEST_AMAX, require_finite
from ..model.quantization.calibration_file import INPUT_SHIFT, KV_AMAX
from ..model.quantization.formats import Fp8Format
from ..model.quantization.observers import OBSERVERS, Observer
from ..model.quantization.recipes import Recipe
from .hessian import HessianSums
from .histogram import Histogram
from .observers import ESTIMATORS


class CalibrationObserver:
    """Exact products whose inputs are recorded as a recipe wants; a ``MatmulBackend``.

    Args:
        recipe: weights in FP8 want histograms of their inputs, weights in 4 bits Hessians, caches in 8 bits the largest
            keys and values.
        experts: experts of a layer.
    """

    def __init__(self, recipe: Recipe, experts: int) -> None:
        self.recipe, self.experts = recipe, experts
        self.histograms: dict[str, list[Histogram]] = {}
        """By the name of a weight; one, or one per expert. Weights that meet the same input share one."""
        self.input_shifts: dict[str, Tensor] = {}
        """By the name of a weight, the shift [K] of its input: the median of each channel in the first call's rows."""
        self.caches: dict[str, tuple[Histogram, Histogram]] = {}
        self.hessians = HessianSums()
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
            self.hessians.add(name, x, expert=expert, experts=self.experts)
        return x @ weight_KN

    def _record(self, name: str, x: Tensor, expert: int | None) -> None:
        if expert is not None:
            if name not in self.histograms:
                self.histograms[name] = [Histogram() for _ in range(self.experts)]
            self.histograms[name][expert].add(x)
            return
        if self._last is not None and self._last[0] is x:  # gate and up, or q, k and v, read one tensor
            first = self._last[1]
            self.histograms[name], self.input_shifts[name] = self.histograms[first], self.input_shifts[first]
            return
        if name not in self.input_shifts:
            self.input_shifts[name] = x.reshape(-1, x.shape[-1]).median(0).values
        self.histograms.setdefault(name, [Histogram()])[0].add(x - self.input_shifts[name])
        self._last = x, name

    def cached(self, name: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Record keys and values."""
        for histogram, x in zip(self.caches.setdefault(name, (Histogram(), Histogram())), (key, value), strict=True):
            histogram.add(x)
        return key, value

    def amaxes(self) -> dict[str, Tensor]:
        """Magnitudes as ``<observer>/<name>`` and shifts as ``input_shift/<name>``, as a calibration stores them."""

        @cache
        def chosen(observer: Observer, histogram: Histogram) -> float:
            return ESTIMATORS[observer](histogram)

        found = {f"{INPUT_SHIFT}/{name}": shift_K.clone() for name, shift_K in self.input_shifts.items()}
        for observer in OBSERVERS:
            for name, histograms in self.histograms.items():
                amax = without_zeros(torch.tensor([chosen(observer, histogram) for histogram in histograms]))
                found[f"{observer}/{name}"] = amax[0] if name in self.input_shifts else amax  # experts have no shift
            for name, pair in self.caches.items():
                amax = torch.tensor([chosen(observer, histogram) for histogram in pair])
                found[f"{observer}/{name}.{KV_AMAX}"] = without_zeros(amax)
        return found


def without_zeros(amax: Tensor) -> Tensor:
    """Replace what cannot be divided by: an expert that saw only zeros takes the largest of its layer, or 1.

    Magnitudes up to 2^-48 are as good as zero: the lowest that a histogram tells apart.
    """
    usable = amax > SMALLEST_AMAX
    return torch.where(usable, amax, amax.max() if usable.any() else 1.0)
