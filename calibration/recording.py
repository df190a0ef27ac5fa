"""A backend that records its inputs, for all recipes at once: magnitudes for FP8, Hessians for 4-bit weights.

Magnitudes are those of the inputs themselves. Hessians leave out the weight of the norm before, so that a build finds
those of any basis (``model/quantization/hessian_basis.py``): ``norm_weights_of`` takes the weights out of a layer's
norms, and the observer multiplies by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from ..model.checkpoint.finite import SMALLEST_AMAX, require_finite
from ..model.checkpoint.rotated import head_rotation
from ..model.config import TextConfig
from ..model.config.names import norm_before
from ..model.llama4.decoder import DecoderLayer
from ..model.quantization.calibration_file import INPUT_ENERGY, KV_AMAX, RESIDUAL_SHARE, ROTATED_VALUE_AMAX
from ..model.quantization.observers import OBSERVERS, Observer
from ..model.quantization.recipes import needs_hessian, needs_input_scale
from .hessian import HessianSums
from .histogram import Histogram
from .observers import ESTIMATORS


class CalibrationObserver:
    """Exact products whose inputs are recorded as the recipes want them; a ``MatmulBackend``.

    Args:
        config: of the decoder.
        norm_weights: of the norms that give their output without, by name.
        hessians: adds up Hessians too, None for magnitudes alone.
    """

    def __init__(
        self, config: TextConfig, norm_weights: Mapping[str, Tensor] | None = None, hessians: HessianSums | None = None
    ) -> None:
        self.config, self.norm_weights, self.hessians = config, norm_weights or {}, hessians
        self.histograms: dict[str, list[Histogram]] = {}
        """By the name of a weight; one, or one per expert. Weights that meet the same input share one."""
        self.energies: dict[str, Tensor] = {}
        """By the name of a weight, sums [K] of the squares of its input's channels."""
        self.caches: dict[str, tuple[Histogram, Histogram]] = {}
        self.rotated_values: dict[str, Histogram] = {}
        """By the name of an attention, as ``caches``: what rotated recipes keep instead of its values."""
        self.residual_shares: dict[str, Tensor] = {}
        self._last: tuple[Tensor, str] | None = None
        self._weighted: tuple[Tensor, Tensor] | None = None
        """What a norm gave last, and that with the norm's weight."""

    def __call__(self, name: str, x: Tensor, weight_KN: Tensor, expert: int | None = None) -> Tensor:
        """Record x, times the weight of the norm before it, and multiply.

        Raises:
            HerdError: x holds a NaN or an infinity.
        """
        weighted = self._with_norm_weight(name, x)
        require_finite(weighted, f"the input of {name}" + (f", expert {expert}," if expert is not None else ""))
        if needs_input_scale(name):
            self._record(name, weighted, expert)
        if self.hessians is not None and needs_hessian(name):
            self.hessians.add(name, x, expert=expert)
        return weighted @ weight_KN

    def _with_norm_weight(self, name: str, x: Tensor) -> Tensor:
        """The input of a product, one tensor for those that read the same."""
        weight_K = self.norm_weights.get(norm_before(name) or "")
        if weight_K is None:
            return x
        if self._weighted is None or self._weighted[0] is not x:
            self._weighted = x, x * weight_K
        return self._weighted[1]

    def _record(self, name: str, x: Tensor, expert: int | None) -> None:
        if expert is not None:
            if name not in self.histograms:
                self.histograms[name] = [Histogram() for _ in range(self.config.num_experts)]
            self.histograms[name][expert].add(x)
            self._add_energy(name, x)
            return
        if self._last is not None and self._last[0] is x:  # gate and up, or q, k and v, read one tensor
            first = self._last[1]
            self.histograms[name], self.energies[name] = self.histograms[first], self.energies[first]
            return
        self.histograms.setdefault(name, [Histogram()])[0].add(x)
        self._add_energy(name, x)
        self._last = x, name

    def _add_energy(self, name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self.energies.setdefault(name, torch.zeros(rows.shape[1])).add_(rows.square().sum(0))

    def cached(self, name: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Record keys and values."""
        for histogram, x in zip(self.caches.setdefault(name, (Histogram(), Histogram())), (key, value), strict=True):
            histogram.add(x)
        width = self.config.head_dim
        heads = value.unflatten(-1, (-1, width)) @ head_rotation(width)
        self.rotated_values.setdefault(name, Histogram()).add(heads)
        return key, value

    def added(self, sublayer: str, before_ND: Tensor, after_ND: Tensor) -> None:
        """Record how much of the residual stream after a sublayer is what it added, for some tokens."""
        energies = [x.square().sum(-1) for x in (after_ND - before_ND, after_ND)]
        self.residual_shares[sublayer] = (energies[0] / energies[1].clamp_min(SMALLEST_AMAX)).clamp_max(1).mean()

    def amaxes(self) -> dict[str, Tensor]:
        """Magnitudes and energies by the names under which a calibration stores them."""

        @cache
        def chosen(observer: Observer, histogram: Histogram) -> float:
            return ESTIMATORS[observer](histogram)

        rows = {name: sum(histogram.rows for histogram in several) for name, several in self.histograms.items()}
        found = {f"{INPUT_ENERGY}/{name}": energy_K / max(rows[name], 1) for name, energy_K in self.energies.items()}
        found |= {f"{RESIDUAL_SHARE}/{name}": share for name, share in self.residual_shares.items()}
        for observer in OBSERVERS:
            for name, histograms in self.histograms.items():
                amax = without_zeros(torch.tensor([chosen(observer, histogram) for histogram in histograms]))
                found[f"{observer}/{name}"] = amax if ".experts." in name else amax[0]
            for name, pair in self.caches.items():
                amax = torch.tensor([chosen(observer, histogram) for histogram in pair])
                found[f"{observer}/{name}.{KV_AMAX}"] = without_zeros(amax)
            for name, histogram in self.rotated_values.items():
                amax = torch.tensor([chosen(observer, histogram)])
                found[f"{observer}/{name}.{ROTATED_VALUE_AMAX}"] = without_zeros(amax)[0]
        return found


def norm_weights_of(layer: DecoderLayer, index: int) -> dict[str, Tensor]:
    """Take the weights out of a layer's norms and leave ones: the weights by name."""
    taken = {}
    for role, norm in (("input_layernorm", layer.input_layernorm),
                       ("post_attention_layernorm", layer.post_attention_layernorm)):
        taken[f"layers.{index}.{role}.weight"] = norm.weight.detach()
        norm.weight = nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)
    return taken


def without_zeros(amax: Tensor) -> Tensor:
    """Replace what cannot be divided by: an expert that saw only zeros takes the largest of its layer, or 1.

    Magnitudes up to 2^-48 are as good as zero: the lowest that a histogram tells apart.
    """
    usable = amax > SMALLEST_AMAX
    return torch.where(usable, amax, amax.max() if usable.any() else 1.0)
