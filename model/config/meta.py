"""Meta's ``params.json``, the content of llama-models' ``ModelArgs``. Torch-free.

It is not complete: token ids are fixed by Meta's vocabulary, and the widths of the feed-forwards follow from other
fields by a rule of the constructors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ...errors import HerdError
from .config import HerdConfig, RopeScaling, TextConfig, VisionConfig
from .validate import MOST_LAYERS, read_section, require_count, square_side


class _Params(msgspec.Struct, kw_only=True):
    """The whole file, which describes the decoder; defaults are those of ``ModelArgs``."""

    n_layers: int
    dim: int
    n_heads: int
    vocab_size: int
    moe_args: dict[str, Any]
    vision_args: dict[str, Any] = {}
    n_kv_heads: int | None = None
    head_dim: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float = 1.0
    ffn_exp: float = 4.0
    norm_eps: float = 1e-5
    nope_layer_interval: int = 0
    attention_chunk_size: int = 0
    rope_theta: float = 500000.0
    use_scaled_rope: bool | int = False
    rope_scaling_factor: float = 16.0
    rope_high_freq_factor: float = 1.0
    use_qk_norm: bool | int = False
    attn_temperature_tuning: bool | int = False
    floor_scale: float = 8192.0
    attn_scale: float = 0.1
    max_seq_len: int = 262144


class _Moe(msgspec.Struct, kw_only=True):
    """The mixture of experts."""

    num_experts: int
    top_k: int = 1
    capacity_factor: float = 1.0
    auto_scale_F: bool | int = True
    interleave_moe_layer_step: int = 1


class _Vision(msgspec.Struct, kw_only=True):
    """The image tower."""

    n_layers: int
    dim: int
    n_heads: int
    mlp_ratio: float
    image_size: int | list[int] | dict[str, int]
    patch_size: int | list[int] | dict[str, int]
    output_dim: int
    pixel_shuffle_ratio: float


def from_meta(raw: Mapping[str, Any]) -> HerdConfig:
    """Parse the content of Meta's ``params.json``.

    Raises:
        HerdError: the mixture-of-experts part is missing (an older Llama), or a value is missing or impossible.
    """
    if "moe_args" not in raw:
        raise HerdError("params.json has no moe_args: this is not a Llama 4 checkpoint")
    params = read_section(raw, _Params)
    vision = _vision_from_meta(params.vision_args) if params.vision_args else None
    return HerdConfig(text=_text_from_meta(params), vision=vision)


def _text_from_meta(params: _Params) -> TextConfig:
    moe = read_section(params.moe_args, _Moe, "moe_args")
    layers = require_count("n_layers", params.n_layers, MOST_LAYERS)
    heads = require_count("n_heads", params.n_heads)
    step = require_count("moe_args.interleave_moe_layer_step", moe.interleave_moe_layer_step)
    interval, chunk = params.nope_layer_interval, params.attention_chunk_size
    rope = tuple(not interval or (i + 1) % interval != 0 for i in range(layers))
    scaling = RopeScaling(factor=params.rope_scaling_factor, high_freq_factor=params.rope_high_freq_factor)
    dense, expert = _widths_from_meta(params, moe)
    return TextConfig(
        vocab_size=params.vocab_size,
        hidden_size=params.dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads if params.n_kv_heads is None else params.n_kv_heads,
        head_dim=params.dim // heads if params.head_dim is None else params.head_dim,
        expert_size=expert,
        dense_size=dense,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        moe_layers=tuple(range(step - 1, layers, step)),
        rope_layers=rope,
        chunked_layers=tuple(bool(chunk) and flag for flag in rope),
        attention_chunk_size=chunk,
        rope_theta=params.rope_theta,
        rope_scaling=scaling if params.use_scaled_rope else None,
        use_qk_norm=bool(params.use_qk_norm),
        attn_temperature_tuning=bool(params.attn_temperature_tuning),
        floor_scale=params.floor_scale,
        attn_scale=params.attn_scale,
        rms_norm_eps=params.norm_eps,
        max_position_embeddings=params.max_seq_len,
        bos_token_id=200000,
        eos_token_ids=(200001, 200007, 200008),
        pad_token_id=200018,
    )


def _widths_from_meta(params: _Params, moe: _Moe) -> tuple[int, int]:
    """Dense and expert feed-forward widths by llama-models' rule (``FeedForward`` and ``MoE`` constructors)."""
    multiple = require_count("multiple_of", params.multiple_of)
    if moe.capacity_factor < 0:
        raise HerdError(f"moe_args.capacity_factor is {moe.capacity_factor}, it must be at least 0: correct it")

    def rounded(width: int) -> int:
        return multiple * -(-width // multiple)

    dense = rounded(int(params.ffn_dim_multiplier * int(2 * (4 * params.dim) / 3)))
    expert = int(params.ffn_dim_multiplier * int(2 * int(params.ffn_exp * params.dim) / 3))
    if moe.auto_scale_F:
        expert = int(expert / (moe.capacity_factor + 1))
    return dense, rounded(expert)


def _vision_from_meta(raw: Mapping[str, Any]) -> VisionConfig:
    vision = read_section(raw, _Vision, "vision_args")
    return VisionConfig(
        hidden_size=vision.dim,
        num_layers=require_count("vision_args.n_layers", vision.n_layers, MOST_LAYERS),
        num_heads=vision.n_heads,
        intermediate_size=int(vision.dim * vision.mlp_ratio),
        image_size=square_side("image_size", vision.image_size),
        patch_size=square_side("patch_size", vision.patch_size),
        adapter_hidden_size=vision.output_dim,
        adapter_output_size=vision.output_dim,
        pixel_shuffle_ratio=vision.pixel_shuffle_ratio,
    )
