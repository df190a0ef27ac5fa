"""Bytes of weights, keys and values as recipes store them.

Weights in floating point take 2 bytes (bfloat16) on a GPU and 4 on the CPU; router and norms always take 4.
What the formats of a recipe take stands in ``model/quantization/formats.py``, for a CPU in ``packed_sizes.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import HerdError
from ...model.config.names import Shape
from ...model.quantization.formats import CACHE_BYTES, Format
from ...model.quantization.recipes import RECIPES, Recipe
from ..cache_type import cache_row_bytes
from ..targets.precision import PRECISIONS, one_of

_CPU, _CUDA, _TENSORRT = PRECISIONS["cpu"], PRECISIONS["cuda"], PRECISIONS["tensorrt"]
_GPU_RECIPES = tuple(dict.fromkeys((*_TENSORRT.recipes, *_CUDA.recipes)))
_CPU_CACHES = tuple("float32" if kind == "float" else kind for kind in _CPU.caches)


@dataclass(frozen=True)
class Storage:
    """A recipe and the type of caches, on a kind of device.

    Attributes:
        recipe: of the weights.
        kv: type of keys and values.
        on_cpu: the device is a CPU, whose bundles keep in float32 what is not quantised.
    """

    recipe: str
    kv: str
    on_cpu: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (("recipe", self.recipe, RECIPES), ("kv", self.kv, CACHE_BYTES)):
            if value not in allowed:
                raise HerdError(f"{name} is {value!r}, it must be one of {', '.join(allowed)}")
        if self.on_cpu and self.recipe not in _CPU.recipes:
            raise HerdError(f"target cpu has no recipe {self.recipe!r}: choose one of {', '.join(_CPU.recipes)}")
        if self.on_cpu and self.kv not in _CPU_CACHES:
            raise HerdError(f"target cpu stores keys and values as {' or '.join(_CPU_CACHES)}, not as {self.kv}")

    @classmethod
    def on(cls, recipe: str, kv: str | None, *, cpu: bool) -> Storage:
        """Storage of a recipe on a kind of device.

        Args:
            recipe: of the weights, by name.
            kv: type of keys and values, None for the type that the target computes in.
            cpu: the device is a CPU.

        Raises:
            HerdError: no such recipe or type, or not on a CPU.
        """
        computed = "float32" if cpu or recipe not in _GPU_RECIPES else "bf16"
        return cls(recipe, kv or computed, cpu)

    @property
    def float_bytes(self) -> int:
        """Bytes of an activation, and of an element of a weight that is not quantised."""
        return 2 if self.recipe in _GPU_RECIPES and not self.on_cpu else 4

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of a token's keys in one head, and as many of its values; on a CPU its share of a cache block."""
        return cache_row_bytes(self.kv, head_dim, in_blocks=self.on_cpu)

    @property
    def products(self) -> str:
        """Type that products with quantised weights are computed in; FP8 on the CPU is emulated in float32."""
        if self.recipe == "fp8":
            return "fp32" if self.on_cpu else "fp8"
        return "int8" if self.on_cpu else self.floats

    @property
    def floats(self) -> str:
        """Type that attention, and products with weights that are not quantised, are computed in."""
        return "bf16" if self.float_bytes == 2 else "fp32"

    @property
    def note(self) -> str:
        """Where the storage differs from what a target builds, for a message; empty where it does not."""
        if self.on_cpu:
            return "fp8 is emulated on a CPU, and slower than predicted" if self.recipe == "fp8" else ""
        if self.recipe in _GPU_RECIPES:
            return ""
        return f"recipe {self.recipe} is built for a CPU only, GPUs have {one_of(_GPU_RECIPES)}"

    @property
    def _stored(self) -> Recipe:
        """The recipe in the formats of the device."""
        recipe = RECIPES[self.recipe]
        return recipe if self.on_cpu or self.recipe not in _CUDA.recipes else recipe.centered()

    def layout_of(self, name: str, shape: Shape) -> Format | None:
        """The format of a tensor, None for floating point."""
        return self._stored.layout_of_tensor(name, shape)

    def bytes_of(self, name: str, shape: Shape) -> float:
        """Bytes of a tensor or of a rank's slice of it: [N, K], or [E, K, N] of experts."""
        return self._stored.stored_bytes(name, shape, self.float_bytes, packed=self.on_cpu)
