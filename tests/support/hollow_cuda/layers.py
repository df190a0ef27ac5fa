"""Layers of Scout and Maverick at their real size, under a small vocabulary."""

from __future__ import annotations

from dataclasses import replace

from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import MAVERICK, SCOUT


def with_layers(config: HerdConfig, *, moe: tuple[bool, ...], chunked: tuple[bool, ...], **text: int) -> HerdConfig:
    """Some layers of a model's real size under a small vocabulary; those that attend in chunks rotate."""
    routed = tuple(layer for layer, is_routed in enumerate(moe) if is_routed)
    return HerdConfig(text=replace(config.text, num_layers=len(moe), moe_layers=routed, rope_layers=chunked,
                                   chunked_layers=chunked, vocab_size=2048, **text))


SCOUT_PAIR = with_layers(SCOUT, moe=(True,) * 2, chunked=(True, False))
MAVERICK_PAIR = with_layers(MAVERICK, moe=(False, True), chunked=(True, False))


def narrow(*chunked: bool) -> HerdConfig:
    """Layers of Scout with thin experts, which are launched as wide ones are."""
    return with_layers(SCOUT, moe=(True,) * len(chunked), chunked=chunked, expert_size=256)
