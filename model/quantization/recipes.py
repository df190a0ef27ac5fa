"""Recipes: which part of the model is stored in which precision. Torch-free.

A weight takes the format of the first rule about a part of the model that it belongs to: ``self_attn`` and
``layers.0.self_attn`` are parts that ``layers.0.self_attn.q_proj.weight`` belongs to. Norms and router stay in floating
point, because a router's error sends tokens to other experts. So does the embedding, unless a rule names it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from ..config.names import Shape
from .formats import BlockFormat, ChannelFormat, Format, Fp8Format
from .outliers import outlier_count
from .packed_sizes import can_pack, packed_bytes

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
"""The table of tokens, and what gives logits."""

Caches = Literal["float", "float16", "int8", "fp8"]
"""How keys and values are stored; ``float`` is the type that the target computes in."""


@dataclass(frozen=True)
class Rule:
    """How the weights of one part of the model are stored.

    Attributes:
        part: whole words of canonical names, such as ``self_attn`` or ``layers.0.feed_forward``; ``*`` is all of it.
        layout: the format, None for floating point.
    """

    part: str
    layout: Format | None

    def applies(self, name: str) -> bool:
        """Whether a weight belongs to the part, by its canonical name."""
        if self.part.startswith("layers."):  # the decoder's, not those of the image tower
            return f"{name}.".startswith(f"{self.part}.")
        return self.part == "*" or f".{self.part}." in f".{name}."


@dataclass(frozen=True)
class Recipe:
    """A choice of formats.

    Attributes:
        name: as given on the command line and stored in the manifest.
        purpose: one line for people.
        rules: the first that applies decides.
        rotated: compute in a basis in which no channel stands out (``model/checkpoint/rotated.py``), as integer formats
            want.
        caches: how keys and values are stored.
        token_scales: 8-bit keys and values have a scale per token, which is found when they are stored; otherwise one
            per layer, which has to be measured.
    """

    name: str
    purpose: str
    rules: tuple[Rule, ...] = ()
    rotated: bool = False
    caches: Caches = "float"
    token_scales: bool = False

    def layout_of(self, *names: str) -> Format | None:
        """The format of a weight, None for floating point.

        Args:
            names: its canonical name, or those of the weights that it joins.
        """
        return next((rule.layout for rule in self.rules if any(map(rule.applies, names))), None)

    def with_high_precision(self, parts: Iterable[str]) -> Recipe:
        """The same recipe with the weights of some parts of the model in floating point."""
        return replace(self, rules=(*(Rule(part, None) for part in parts), *self.rules))

    def centered(self) -> Recipe:
        """The same recipe with integers as GPUs read them, in blocks of 32 inputs; images and table stay floats."""
        rules = [centered for rule in self.rules for centered in _centered(rule)]
        return replace(self, rules=(*_GPU_FLOATS, *rules) if self.rules else ())

    @property
    def fp8(self) -> bool:
        """Whether any weight is stored in FP8."""
        return any(isinstance(rule.layout, Fp8Format) for rule in self.rules)

    @property
    def uses_hessians(self) -> bool:
        """Whether any weight has less than 8 bits, which lose much less with the Hessians of a calibration.

        Weights of 8 bits and FP8 are rounded by them as well, if a build is given a calibration that has any.
        """
        return any(isinstance(rule.layout, BlockFormat) and rule.layout.bits < 8 for rule in self.rules)

    @property
    def needs_calibration(self) -> str:
        """What cannot be stored without a calibration, for a message; empty when nothing is."""
        if self.fp8:
            return "FP8 inputs of matrix products"
        return "8-bit keys and values" if self.measured_caches else ""

    @property
    def measured_caches(self) -> bool:
        """Whether the scales of keys and values come from a calibration."""
        return self.caches in ("int8", "fp8") and not self.token_scales

    def layout_of_tensor(self, name: str, shape: Shape) -> Format | None:
        """As ``layout_of``, for any tensor of a checkpoint: vectors and tables of positions stay floats."""
        if name == EMBEDDING:
            return self.embedding_layout
        return self.layout_of(name) if _is_matrix(name, shape) else None

    @property
    def embedding_layout(self) -> Format | None:
        """The format of the embedding table: that of the rule which names it, the others are about products."""
        return next((rule.layout for rule in self.rules if rule.part == "embed_tokens"), None)

    def stored_bytes(self, name: str, shape: Shape, float_bytes: int, *, packed: bool = False) -> float:
        """Bytes of a tensor or of a rank's slice of it.

        Args:
            name: canonical.
            shape: [N, K], or [E, K, N] of experts.
            float_bytes: of an element that stays in floating point; vectors and routers always take 4.
            packed: as our own CPU operators read it, where they have its format.
        """
        layout = self.layout_of_tensor(name, shape)
        experts, outputs, inputs = (shape[0], shape[2], shape[1]) if len(shape) == 3 else (1, shape[0], shape[-1])
        if packed and not self.fp8 and _is_matrix(name, shape) and can_pack(layout):
            shares = ".gate_proj." in name or ".up_proj." in name
            return float(experts * packed_bytes(inputs, outputs, layout, shares_tiles=shares))
        if layout is not None:
            outliers = float_bytes * outlier_count(inputs) * outputs if isinstance(layout, Fp8Format) else 0
            return float(experts * (layout.stored_bytes(inputs, outputs) + outliers))
        is_float32 = len(shape) == 1 or ".router." in name
        return float((4 if is_float32 else float_bytes) * math.prod(shape))


def is_table(name: str) -> bool:
    """Whether a tensor's rows are looked up instead of multiplied."""
    return "embed" in name and "patch_embedding" not in name


def _is_matrix(name: str, shape: Shape) -> bool:
    """Whether a tensor of a checkpoint is multiplied with, not added or looked up."""
    return len(shape) > 1 and not is_table(name)


def _centered(rule: Rule) -> tuple[Rule, ...]:
    """A rule in the formats of GPUs: fused experts in 8 bits have a scale per channel, all else one per block."""
    if rule.layout is None:
        return (rule,)
    bits = rule.layout.bits if isinstance(rule.layout, BlockFormat) else 8
    experts = (Rule("experts", ChannelFormat(centered=True)),) if bits == 8 and rule.part == "*" else ()
    return *experts, Rule(rule.part, BlockFormat(bits, 32, centered=True))


_GPU_FLOATS = (Rule("vision_model", None), Rule("multi_modal_projector", None), Rule("embed_tokens", None))
_CHANNEL = ChannelFormat()
_COMMON = (
    Rule("router", None), Rule("embed_tokens", _CHANNEL),
    # The image tower is not rotated: its inputs keep their outliers, and want a scale per block.
    Rule("vision_model", BlockFormat(8, 64)), Rule("multi_modal_projector", BlockFormat(8, 64)),
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", "float32 throughout"),
        Recipe("bf16", "bfloat16 throughout, router and norms in float32"),
        Recipe("fp8", "FP8 (E4M3) products, scales by calibration; router, head and embedding in floating point",
               (Rule("router", None), Rule("lm_head", None), Rule("embed_tokens", None), Rule("patch_embedding", None),
                Rule("*", Fp8Format()))),
        Recipe("int8", "8-bit weights, a scale per output channel; 8-bit activations",
               (*_COMMON, Rule("*", _CHANNEL)), rotated=True),
        Recipe("int4", "4-bit feed-forwards in blocks, 8-bit attention, head and images; 8-bit activations",
               (*_COMMON, Rule("lm_head", _CHANNEL), Rule("self_attn", _CHANNEL), Rule("*", BlockFormat(4, 32))),
               rotated=True),
    )
}

LADDER = {bits: Recipe(f"{bits} bits", "", (*_COMMON, Rule("*", BlockFormat(bits, 64))), rotated=True)
          for bits in (4, 5, 6)} | {8: RECIPES["int8"]}
"""By bits, everything that is multiplied in the format of so many: between them a size in bits chooses."""


def needs_input_scale(name: str) -> bool:
    """Whether some recipe stores a weight in FP8, and so wants to know how large its input gets."""
    return any(isinstance(recipe.layout_of(name), Fp8Format) for recipe in RECIPES.values())


def is_rounded_by_hessian(name: str) -> bool:
    """Whether a weight may be rounded by the Hessian of its input: the matrices of the decoder, router excepted."""
    return name.startswith(("layers.", "lm_head.")) and "norm" not in name and ".router." not in name


def needs_hessian(name: str) -> bool:
    """Whether a calibration measures the Hessian of a weight's input.

    Of weights that read the same input one is asked for all, see ``hessian_name``.
    """
    return is_rounded_by_hessian(name) and hessian_name(name) == name


def hessian_name(name: str) -> str:
    """The weight under whose name the Hessian of a weight's input is stored: q for k and v, gate for up."""
    for other, first in ((".k_proj.", ".q_proj."), (".v_proj.", ".q_proj."), (".up_proj.", ".gate_proj.")):
        name = name.replace(other, first)
    return name
