"""Matrix products of a streamed model: each asks a ``MatmulBackend`` for its result, so that no model is changed.

``Exact`` multiplies. ``Quantized`` rounds to FP8 as an engine does and multiplies in float32. ``CalibrationObserver``
(``recording.py``) multiplies exactly and records the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from ..model.quantization.e4m3 import channel_scales, expert_input_multipliers, input_scale, to_e4m3
from ..model.quantization.formats import Fp8Format
from ..model.quantization.recipes import Recipe


class MatmulBackend(Protocol):
    """Computes the matrix products of a model, and what comes back from its key-value cache."""

    def __call__(self, name: str, x: Tensor, weight_KN: Tensor, expert: int | None = None) -> Tensor:
        """``x @ weight``. ``name`` is the weight's in the checkpoint, ``expert`` its index in a stack of them."""

    def cached(self, name: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of an attention layer as they come back from the cache."""


class Exact:
    """Products in float32."""

    def __call__(self, name: str, x: Tensor, weight_KN: Tensor, expert: int | None = None) -> Tensor:
        """``x @ weight``."""
        return x @ weight_KN

    def cached(self, name: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Unchanged."""
        return key, value


class Quantized:
    """Products as an FP8 engine computes them: both sides rounded to E4M3, summed in float32.

    Args:
        recipe: which weights are stored in FP8.
        input_amax: the largest magnitude to represent of a weight's input, a scalar or [E], by the weight's name.
        outliers: the channels of a weight's input which are not rounded, nor what they meet, by the weight's name; None
            for none.
        kv_amax: the largest magnitudes of keys and values, by the name of the attention; for recipes with FP8 caches.
    """

    def __init__(
        self, recipe: Recipe, input_amax: Callable[[str], Tensor], outliers: Callable[[str], Tensor | None],
        kv_amax: Callable[[str], tuple[float, float]] | None = None,
    ) -> None:
        self.recipe = recipe
        self._input_amax, self._outliers, self._kv_amax = input_amax, outliers, kv_amax
        self._weights: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, name: str, x: Tensor, weight_KN: Tensor, expert: int | None = None) -> Tensor:
        """``x @ weight``, in FP8 when the recipe says so."""
        if not isinstance(self.recipe.layout_of(name), Fp8Format):
            return x @ weight_KN
        amax = self._input_amax(name)
        scale = input_scale(float(amax.max()))
        if expert is not None:
            scale /= float(expert_input_multipliers(amax)[expert])
        given, outliers_J = rounded(x, scale), self._outliers(name)
        if outliers_J is not None:
            given[..., outliers_J] = x[..., outliers_J]
        return given @ self._rounded_weight(name, weight_KN)

    def cached(self, name: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values through E4M3 when the recipe caches in FP8."""
        if self.recipe.caches != "fp8" or self._kv_amax is None:
            return key, value
        amax_key, amax_value = self._kv_amax(name)
        return rounded(key, input_scale(amax_key)), rounded(value, input_scale(amax_value))

    def _rounded_weight(self, name: str, weight_KN: Tensor) -> Tensor:
        """The rounded weight; that of the last call is kept, because windows follow each other."""
        source, found = self._weights.get(name, (None, None))
        # The source is kept as well, so that no other weight can lie where it does.
        if source is None or found is None or source.data_ptr() != weight_KN.data_ptr():
            found = self._round(name, weight_KN)
            self._weights[name] = weight_KN, found
        return found

    def _round(self, name: str, weight_KN: Tensor) -> Tensor:
        """To nearest, but for what outlier channels meet."""
        outliers_J, rest_KN = self._outliers(name), weight_KN
        if outliers_J is not None:
            rest_KN = weight_KN.index_fill(0, outliers_J, 0.0)
        scales_N = channel_scales(rest_KN.T)
        found = to_e4m3(rest_KN / scales_N).float() * scales_N
        return found if outliers_J is None else found.index_copy_(0, outliers_J, weight_KN[outliers_J])

    def forget(self) -> None:
        """Drop the weights of a layer that is done."""
        self._weights.clear()


def rounded(x: Tensor, scale: float) -> Tensor:
    """Values of x after a trip through E4M3 by a scale."""
    return to_e4m3(x / scale).float() * scale


class NamedLinear(nn.Linear):
    """A linear layer whose product a ``MatmulBackend`` computes."""

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.name = name
        self.backend: MatmulBackend = Exact()

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``."""
        y = self.backend(self.name, x, self.weight.detach().T)
        return y if self.bias is None else y + self.bias


def name_linears(module: nn.Module, prefix: str = "") -> None:
    """Replace every linear layer of a module on the meta device by a ``NamedLinear``."""
    for path, part in list(module.named_modules()):
        if type(part) is nn.Linear:
            owner, _, attribute = path.rpartition(".")
            setattr(module.get_submodule(owner), attribute, NamedLinear(part, f"{prefix}{path}.weight"))


def set_backend(module: nn.Module, backend: MatmulBackend) -> None:
    """Let the linear layers of a module ask a ``MatmulBackend`` from now on."""
    for part in module.modules():
        if isinstance(part, NamedLinear):
            part.backend = backend

