"""Bytes of weights, keys and values as the formats of the recipes store them.

    floats      2 bytes (bfloat16) in plans of TensorRT, 4 on the CPU; router and norms always 4
    channel     a byte per weight, a float32 scale (int8) or ratio (FP8) per output channel
    blocks      codes, a float32 scale and with 4 bits a zero point per block of inputs; a last block is filled up

These are the rules of ``export/recipes.py``, which needs torch; a test compares the two tensor by tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ...errors import HerdError

Layout = Literal["floats", "channel", "8 bits in blocks of 64", "4 bits in blocks of 32"]
Shape = tuple[int, ...]

_BLOCKS: dict[Layout, tuple[int, int]] = {"8 bits in blocks of 64": (8, 64), "4 bits in blocks of 32": (4, 32)}
_IMAGES: tuple[tuple[str, Layout], ...] = (
    ("vision_model.", "8 bits in blocks of 64"), ("multi_modal_projector.", "8 bits in blocks of 64"),
)
_RULES: dict[str, tuple[tuple[str, Layout], ...]] = {
    "fp32": (("", "floats"),),
    "bf16": (("", "floats"),),
    "fp8": (("lm_head.", "floats"), ("patch_embedding.", "floats"), ("", "channel")),
    "int8": (*_IMAGES, ("", "channel")),
    "int4": (*_IMAGES, ("lm_head.", "channel"), ("self_attn.", "channel"), ("", "4 bits in blocks of 32")),
}
"""By recipe: the first part of a name that applies decides."""
_CACHES = {"float32": 4, "bf16": 2, "fp8": 1, "int8": 1}
RECIPES = tuple(_RULES)
CACHES = tuple(_CACHES)
_ON_CPU, _ON_GPU = ("fp32", "int8", "int4", "fp8"), ("bf16", "fp8")


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
        for name, value, allowed in (("recipe", self.recipe, RECIPES), ("kv", self.kv, CACHES)):
            if value not in allowed:
                raise HerdError(f"{name} is {value!r}, it must be one of {', '.join(allowed)}")
        if self.on_cpu and self.recipe not in _ON_CPU:
            raise HerdError(f"target cpu has no recipe {self.recipe!r}: choose one of {', '.join(_ON_CPU)}")
        if self.on_cpu and self.kv not in ("float32", "int8"):
            raise HerdError(f"target cpu stores keys and values as float32 or int8, not as {self.kv}")

    @classmethod
    def on(cls, recipe: str, kv: str | None, *, cpu: bool) -> Storage:
        """Of a recipe and caches; None for caches in the type that the target computes in."""
        computed = "float32" if cpu or recipe not in _ON_GPU else "bf16"
        return cls(recipe, kv or computed, cpu)

    @property
    def float_bytes(self) -> int:
        """Of a weight that is not quantised, and of an activation: bundles of int8 and int4 exist for the CPU only."""
        return 2 if self.recipe in _ON_GPU and not self.on_cpu else 4

    @property
    def kv_bytes(self) -> int:
        """Of an element of keys or values; their scales are constants of the graph."""
        return _CACHES[self.kv]

    @property
    def products(self) -> str:
        """Type of products with quantised weights; FP8 on the CPU is emulated in float32."""
        return "fp8" if self.recipe == "fp8" and not self.on_cpu else "fp32" if self.recipe == "fp8" else "int8"

    @property
    def floats(self) -> str:
        """Type of attention, and of products with weights that are not quantised."""
        return "bf16" if self.float_bytes == 2 else "fp32"

    @property
    def note(self) -> str:
        """What differs from what a target does, for a message; empty where nothing does."""
        if self.on_cpu:
            return "fp8 is emulated on a CPU, and slower than predicted" if self.recipe == "fp8" else ""
        if self.recipe in _ON_GPU:
            return ""
        return f"recipe {self.recipe} is built for target cpu only, TensorRT has {' and '.join(_ON_GPU)}"

    def layout_of(self, name: str, shape: Shape) -> Layout | None:
        """How a tensor is stored; None for what stays float32 whatever the recipe: router and norms."""
        if len(shape) == 1 or ".router." in name:
            return None
        if "embed" in name and "patch_embedding" not in name:  # tables are looked up, not multiplied
            return "floats"
        return next(layout for part, layout in _RULES[self.recipe] if part in name)

    def bytes_of(self, name: str, shape: Shape) -> float:
        """Bytes of a tensor or of a rank's slice of it: [N, K], or [E, K, N] of experts."""
        layout = self.layout_of(name, shape)
        count = math.prod(shape)
        if layout is None:
            return 4.0 * count
        if layout == "floats":
            return float(self.float_bytes * count)
        experts, outputs, inputs = (shape[0], shape[2], shape[1]) if len(shape) == 3 else (1, *shape)
        if layout == "channel":
            return count + 4.0 * experts * outputs
        bits, block = _BLOCKS[layout]
        blocks = -(-inputs // block)
        zeros = -(-blocks // 2) if bits == 4 else 0
        return float(experts * outputs * (blocks * (block * bits // 8 + 4) + zeros))
