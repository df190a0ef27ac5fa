"""The released models, and small relatives of them for tests and demonstrations."""

from __future__ import annotations

import re
from dataclasses import replace

from ...errors import HerdError
from .config import HerdConfig, RopeScaling, TextConfig, VisionConfig

_STOPS = (200001, 200007, 200008)


def _nope_every(interval: int, layers: int) -> tuple[bool, ...]:
    return tuple((layer + 1) % interval != 0 for layer in range(layers))


VISION = VisionConfig(
    hidden_size=1408, num_layers=34, num_heads=16, intermediate_size=5632, image_size=336, patch_size=14,
    adapter_hidden_size=4096, adapter_output_size=4096,
)

SCOUT = HerdConfig(
    text=TextConfig(
        vocab_size=202048, hidden_size=5120, num_layers=48, num_heads=40, num_kv_heads=8, head_dim=128,
        expert_size=8192, dense_size=16384, num_experts=16, top_k=1, moe_layers=tuple(range(48)),
        rope_layers=_nope_every(4, 48), chunked_layers=_nope_every(4, 48), attention_chunk_size=8192,
        rope_scaling=RopeScaling(), use_qk_norm=True, attn_temperature_tuning=True,
        max_position_embeddings=10485760, bos_token_id=200000, eos_token_ids=_STOPS, pad_token_id=200018,
    ),
    vision=VISION,
)

MAVERICK = replace(
    SCOUT,
    text=replace(
        SCOUT.text, num_experts=128, moe_layers=tuple(range(1, 48, 2)), rope_scaling=None, use_qk_norm=False,
        max_position_embeddings=1048576,
    ),
)

# Meta announced Behemoth with 16 experts, 288 B active of about 2 T parameters, and never published its configuration.
# This one is ours: Scout's structure, solved for those three numbers (1.993 T, 288.5 B with both vocabulary matrices).
BEHEMOTH = replace(
    SCOUT,
    text=replace(
        SCOUT.text, hidden_size=16384, num_layers=96, num_heads=128, expert_size=24064, dense_size=49152,
        moe_layers=tuple(range(96)), rope_layers=_nope_every(4, 96), chunked_layers=_nope_every(4, 96),
        rope_scaling=None, use_qk_norm=False, max_position_embeddings=1048576,
    ),
)

TINY = HerdConfig(
    text=TextConfig(
        vocab_size=512, hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16,
        expert_size=48, dense_size=96, num_experts=4, top_k=1, moe_layers=(1, 3),
        rope_layers=_nope_every(4, 4), chunked_layers=_nope_every(4, 4), attention_chunk_size=16,
        rope_scaling=RopeScaling(original_max_position_embeddings=32), use_qk_norm=True,
        attn_temperature_tuning=True, floor_scale=8, max_position_embeddings=4096, bos_token_id=1,
        eos_token_ids=(2,), pad_token_id=0,
    ),
    vision=VisionConfig(
        hidden_size=32, num_layers=2, num_heads=2, intermediate_size=128, image_size=28, patch_size=7,
        adapter_hidden_size=48, adapter_output_size=48,
    ),
    image_token_id=500, begin_image_token_id=501, end_image_token_id=502,
)

PRESETS = {
    "scout": SCOUT, "maverick": MAVERICK, "behemoth": BEHEMOTH, "tiny": TINY, "tiny-text": HerdConfig(text=TINY.text),
}


_RELEASED = re.compile(r"(?:meta-llama/)?Llama-4-(Scout-17B-16E|Maverick-17B-128E)(?:-Instruct)?(?:-FP8)?", re.I)
"""Released models as the Hugging Face hub calls them."""


def is_preset(name: str) -> bool:
    """Whether ``preset`` knows a name."""
    return _preset_name(name) in PRESETS


def preset(name: str) -> HerdConfig:
    """A configuration by name: ``scout``, ``maverick``, ``behemoth`` (a guess), ``tiny`` or ``tiny-text``.

    Released models are also known by what the hub calls them, such as ``meta-llama/Llama-4-Scout-17B-16E-Instruct``.

    Raises:
        HerdError: no preset has that name.
    """
    if not is_preset(name):
        raise HerdError(f"no preset is called {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[_preset_name(name)]


def _preset_name(name: str) -> str:
    released = _RELEASED.fullmatch(name)
    return released[1].partition("-")[0].lower() if released else name
