"""Recipes: which part of the model is stored in which precision.

A weight takes the format of the first rule whose word stands in its name (``layers.0.self_attn.q_proj.weight``);
norms, router and embedding stay float32, because a router's error sends tokens to other experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .block_format import BlockFormat
from .channel_format import ChannelFormat

Format = BlockFormat | ChannelFormat


@dataclass(frozen=True)
class Rule:
    """Weights whose name contains ``word`` are stored in ``layout``, None for float32."""

    word: str
    layout: Format | None


@dataclass(frozen=True)
class Recipe:
    """A choice of formats.

    Attributes:
        name: as given on the command line and stored in the manifest.
        purpose: one line for people.
        rules: the first that applies decides.
        rotated: compute in a basis in which no channel stands out (``rotation.py``), as quantised recipes want.
        int8_caches: keys and values in 8 bits instead of float32; needs a calibration file.
    """

    name: str
    purpose: str
    rules: tuple[Rule, ...] = ()
    rotated: bool = False
    int8_caches: bool = False

    def layout_of(self, weight: str) -> Format | None:
        """The format of a weight by its name, None for float32."""
        words = re.split("[./+]", weight)
        return next((rule.layout for rule in self.rules if rule.word in ("*", *words)), None)

    def bytes_per_weight(self, weight: str) -> float:
        """Stored bytes per element of a weight."""
        layout = self.layout_of(weight)
        return layout.bytes_per_weight() if layout else 4.0


_CHANNEL = ChannelFormat()
_COMMON = (
    Rule("router", None),
    # The image tower is not rotated: its inputs keep their outliers, and want a scale per block.
    Rule("vision_model", BlockFormat(8, 64)), Rule("multi_modal_projector", BlockFormat(8, 64)),
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", "float32 throughout"),
        Recipe("int8", "8-bit weights, a scale per output channel; 8-bit activations",
               (*_COMMON, Rule("*", _CHANNEL)), rotated=True),
        Recipe("int4", "4-bit feed-forwards in blocks, 8-bit attention, head and images; 8-bit activations",
               (*_COMMON, Rule("lm_head", _CHANNEL), Rule("self_attn", _CHANNEL), Rule("*", BlockFormat(4, 32))),
               rotated=True),
    )
}
