"""Parts of a model that FP8 recipes may leave in high precision."""

from __future__ import annotations

from ..config import HerdConfig

PARTS = ("attention", "routed experts", "shared experts", "dense feed-forwards", "images")


def parts_of(config: HerdConfig) -> dict[str, list[str]]:
    """Those of ``PARTS`` that a model has, to what a recipe's rules call them."""
    text = config.text
    dense = [f"layers.{layer}.feed_forward" for layer in range(text.num_layers) if layer not in text.moe_layers]
    rules = (
        ["self_attn"], ["feed_forward.experts"] if text.moe_layers else [],
        ["shared_expert"] if text.moe_layers else [], dense,
        ["vision_model", "multi_modal_projector"] if config.vision else [],
    )
    return {name: found for name, found in zip(PARTS, rules, strict=True) if found}
