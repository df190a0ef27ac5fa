"""Recipes: which part of the model is stored in which precision.

A weight takes the format of the first rule whose word stands in its name (``layers.0.self_attn.q_proj.weight``);
norms, router and embedding stay float32, because a router's error sends tokens to other experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .quantize import BlockFormat


@dataclass(frozen=True)
class Rule:
    """Weights whose name contains ``word`` are stored in ``layout``, None for float32."""

    word: str
    layout: BlockFormat | None


@dataclass(frozen=True)
class Recipe:
    """A choice of formats.

    Attributes:
        name: as given on the command line and stored in the manifest.
        purpose: one line for people.
        rules: the first that applies decides.
    """

    name: str
    purpose: str
    rules: tuple[Rule, ...] = ()

    def layout_of(self, weight: str) -> BlockFormat | None:
        """The format of a weight by its name, None for float32."""
        words = re.split("[./+]", weight)
        return next((rule.layout for rule in self.rules if rule.word in ("*", *words)), None)

    def bytes_per_weight(self, weight: str) -> float:
        """Stored bytes per element of a weight."""
        layout = self.layout_of(weight)
        return layout.bytes_per_weight() if layout else 4.0


_ROUTER = Rule("router", None)
_INT8, _INT8_FINE = BlockFormat(8, 128), BlockFormat(8, 64)
_IMAGES = (Rule("vision_model", _INT8_FINE), Rule("multi_modal_projector", _INT8_FINE))
_HEAD = (Rule("lm_head", _INT8), Rule("embed_tokens", _INT8))
"""The head is the embedding, transposed, when both are tied."""

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", "float32 throughout"),
        # The inputs of down_proj have outliers that no norm can be scaled against: its blocks are finer.
        Recipe("int8", "8-bit weights and activations in blocks",
               (_ROUTER, *_IMAGES, Rule("down_proj", _INT8_FINE), Rule("*", _INT8))),
        Recipe("int4", "4-bit experts, 8-bit attention, head and images",
               (_ROUTER, *_IMAGES, Rule("self_attn", _INT8), *_HEAD, Rule("*", BlockFormat(4, 32)))),
    )
}

