"""Hugging Face's ``config.json``, read and written. Torch-free.

Three traps of published files are resolved here once, so that nobody else has to know them:

* ``no_rope_layers`` is a list of *uses RoPE* flags (1 = RoPE), and an empty list means "derive from the interval":
  layer i (0-based) has no positional encoding when ``(i + 1) % no_rope_layer_interval == 0``;
* ``attn_temperature_tuning`` may be the integer 4 and means "on"; ``attention_chunk_size`` may be null and means
  "no chunks, every layer attends to everything";
* ``intermediate_size`` is the width of an expert and of the shared expert, ``intermediate_size_mlp`` of a dense layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import msgspec

from ...errors import HerdError
from .config import HerdConfig, RopeScaling, TextConfig, VisionConfig
from .validate import MOST_LAYERS, read_section, require_count, square_side

Value = TypeVar("Value")

_NULL_IS_OFF = ("attention_chunk_size", "use_qk_norm", "attn_temperature_tuning", "tie_word_embeddings")
"""Fields whose null means "none" or "no"; for all others it means the default, as if they were absent."""


class _Whole(msgspec.Struct, kw_only=True):
    """A multimodal model. Token ids have two spellings, by transformers' version."""

    text_config: dict[str, Any] = {}
    vision_config: dict[str, Any] = {}
    tie_word_embeddings: bool | int | None = None
    image_token_index: int | None = None
    image_token_id: int = 200092
    boi_token_index: int | None = None
    boi_token_id: int = 200080
    eoi_token_index: int | None = None
    eoi_token_id: int = 200081


class _Text(msgspec.Struct, kw_only=True):
    """The decoder; defaults are those of transformers' ``Llama4TextConfig``."""

    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    intermediate_size_mlp: int = 16384
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_local_experts: int = 16
    num_experts_per_tok: int = 1
    interleave_moe_layer_step: int = 1
    moe_layers: list[int] | None = None
    no_rope_layers: list[bool | int] = []
    no_rope_layer_interval: int = 4
    layer_types: list[str] = []
    attention_chunk_size: int = 8192
    rope_theta: float = 500000.0
    rope_scaling: dict[str, Any] = {}
    rope_parameters: dict[str, Any] = {}
    use_qk_norm: bool | int = True
    attn_temperature_tuning: bool | int = True
    floor_scale: float = 8192.0
    attn_scale: float = 0.1
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool | int = False
    max_position_embeddings: int = 131072
    bos_token_id: int | None = None
    eos_token_id: int | list[int] = []
    pad_token_id: int | None = None


class _Rope(msgspec.Struct, kw_only=True):
    """RoPE theta and the kind of its scaling, which is spelled in two ways."""

    rope_theta: float | None = None
    rope_type: str | None = None
    type: str = "default"


class _Llama3Rope(msgspec.Struct, kw_only=True):
    """Llama 3 frequency scaling; a file that has it gives all four numbers."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class _Vision(msgspec.Struct, kw_only=True):
    """The image tower; defaults are those of transformers' ``Llama4VisionConfig``."""

    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    intermediate_size: int
    image_size: int | list[int] | dict[str, int]
    patch_size: int | list[int] | dict[str, int]
    projector_input_dim: int
    vision_output_dim: int
    pixel_shuffle_ratio: float = 0.5
    rope_theta: float = 10000.0
    rope_parameters: dict[str, Any] = {}
    num_channels: int = 3


def from_hf(raw: Mapping[str, Any]) -> HerdConfig:
    """Parse the content of a Hugging Face ``config.json``, of the whole model or of its text part alone.

    Raises:
        HerdError: ``model_type`` is not ``llama4`` or ``llama4_text``, or a value is missing or impossible.
    """
    kind = raw.get("model_type")
    if kind not in ("llama4", "llama4_text"):
        raise HerdError(f"model_type is {kind!r}, llama4 or llama4_text is needed: not a Llama 4 checkpoint")
    if kind == "llama4_text":
        return HerdConfig(text=_text_from_hf(raw))
    whole = read_section(_off_where_null(raw), _Whole)
    text = whole.text_config
    if whole.tie_word_embeddings is not None:
        text = {**text, "tie_word_embeddings": whole.tie_word_embeddings}
    return HerdConfig(
        text=_text_from_hf(text, "text_config"),
        vision=_vision_from_hf(whole.vision_config, "vision_config") if whole.vision_config else None,
        image_token_id=_first(whole.image_token_index, whole.image_token_id),
        begin_image_token_id=_first(whole.boi_token_index, whole.boi_token_id),
        end_image_token_id=_first(whole.eoi_token_index, whole.eoi_token_id),
    )


def _text_from_hf(raw: Mapping[str, Any], place: str = "") -> TextConfig:
    text = read_section(_off_where_null(raw), _Text, place)
    layers = require_count("num_hidden_layers", text.num_hidden_layers, MOST_LAYERS)
    heads = require_count("num_attention_heads", text.num_attention_heads)
    interval = require_count("no_rope_layer_interval", text.no_rope_layer_interval)
    step = require_count("interleave_moe_layer_step", text.interleave_moe_layer_step)
    flags = text.no_rope_layers or [(i + 1) % interval != 0 for i in range(layers)]
    rope = tuple(bool(flag) for flag in flags[:layers])
    types = text.layer_types or ["chunked_attention" if flag else "full_attention" for flag in rope]
    chunk = text.attention_chunk_size
    theta, scaling = rope_from_hf(text.rope_theta, text.rope_scaling, text.rope_parameters)
    return TextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_first(text.num_key_value_heads, heads),
        head_dim=_first(text.head_dim, text.hidden_size // heads),
        expert_size=text.intermediate_size,
        dense_size=text.intermediate_size_mlp,
        num_experts=text.num_local_experts,
        top_k=text.num_experts_per_tok,
        moe_layers=tuple(range(step - 1, layers, step) if text.moe_layers is None else text.moe_layers),
        rope_layers=rope,
        chunked_layers=tuple(bool(chunk) and kind == "chunked_attention" for kind in types[:layers]),
        attention_chunk_size=chunk,
        rope_theta=theta,
        rope_scaling=scaling,
        use_qk_norm=bool(text.use_qk_norm),
        attn_temperature_tuning=bool(text.attn_temperature_tuning),
        floor_scale=text.floor_scale,
        attn_scale=text.attn_scale,
        rms_norm_eps=text.rms_norm_eps,
        tie_word_embeddings=bool(text.tie_word_embeddings),
        max_position_embeddings=text.max_position_embeddings,
        bos_token_id=text.bos_token_id,
        eos_token_ids=tuple(text.eos_token_id) if isinstance(text.eos_token_id, list) else (text.eos_token_id,),
        pad_token_id=text.pad_token_id,
    )


def rope_from_hf(
    rope_theta: float, rope_scaling: Mapping[str, Any], rope_parameters: Mapping[str, Any]
) -> tuple[float, RopeScaling | None]:
    """RoPE theta and scaling: transformers 5 keeps both in ``rope_parameters``, earlier files in two fields.

    Args:
        rope_theta: where neither of the objects has it.
        rope_scaling: the object of that name, empty if there is none.
        rope_parameters: the object of that name, empty if there is none; goes before the other.

    Raises:
        HerdError: another kind of scaling than llama3, or a value is missing or of the wrong type.
    """
    merged = {**rope_scaling, **rope_parameters}
    place = "rope_parameters" if rope_parameters else "rope_scaling"
    rope = read_section(merged, _Rope, place)
    theta, kind = _first(rope.rope_theta, rope_theta), _first(rope.rope_type, rope.type)
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise HerdError(f"rope_type is {kind!r}, default or llama3 is what Llama 4 uses")
    return theta, RopeScaling(**msgspec.structs.asdict(read_section(merged, _Llama3Rope, place)))


def _vision_from_hf(raw: Mapping[str, Any], place: str) -> VisionConfig:
    vision = read_section(raw, _Vision, place)
    rope = read_section(vision.rope_parameters, _Rope, f"{place}.rope_parameters")
    return VisionConfig(
        hidden_size=vision.hidden_size,
        num_layers=require_count("num_hidden_layers", vision.num_hidden_layers, MOST_LAYERS),
        num_heads=vision.num_attention_heads,
        intermediate_size=vision.intermediate_size,
        image_size=square_side("image_size", vision.image_size),
        patch_size=square_side("patch_size", vision.patch_size),
        adapter_hidden_size=vision.projector_input_dim,
        adapter_output_size=vision.vision_output_dim,
        pixel_shuffle_ratio=vision.pixel_shuffle_ratio,
        rope_theta=_first(rope.rope_theta, vision.rope_theta),
        num_channels=vision.num_channels,
    )


def to_hf(config: HerdConfig) -> dict[str, Any]:
    """The Hugging Face ``config.json`` of a model; ``from_hf`` of it gives an equal configuration."""
    text = _text_to_hf(config.text)
    if config.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": text,
        "vision_config": _vision_to_hf(config.vision),
        "image_token_index": config.image_token_id,
        "boi_token_index": config.begin_image_token_id,
        "eoi_token_index": config.end_image_token_id,
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }


def _text_to_hf(text: TextConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": text.rope_theta}
    if text.rope_scaling:
        rope = {"rope_type": "llama3", "rope_theta": text.rope_theta, **asdict(text.rope_scaling)}
    return {
        "model_type": "llama4_text",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.expert_size,
        "intermediate_size_mlp": text.dense_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "num_local_experts": text.num_experts,
        "num_experts_per_tok": text.top_k,
        "moe_layers": list(text.moe_layers),
        "no_rope_layers": [int(flag) for flag in text.rope_layers],
        "layer_types": ["chunked_attention" if flag else "full_attention" for flag in text.chunked_layers],
        "attention_chunk_size": text.attention_chunk_size or None,
        "rope_parameters": rope,
        "use_qk_norm": text.use_qk_norm,
        "attn_temperature_tuning": text.attn_temperature_tuning,
        "floor_scale": int(text.floor_scale),
        "attn_scale": text.attn_scale,
        "rms_norm_eps": text.rms_norm_eps,
        "tie_word_embeddings": text.tie_word_embeddings,
        "max_position_embeddings": text.max_position_embeddings,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": list(text.eos_token_ids) or None,
        "pad_token_id": text.pad_token_id,
        "hidden_act": "silu",
        "attention_bias": False,
    }


def _vision_to_hf(vision: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "llama4_vision_model",
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": vision.intermediate_size,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": vision.num_channels,
        "projector_input_dim": vision.adapter_hidden_size,
        "projector_output_dim": vision.adapter_output_size,
        "vision_output_dim": vision.adapter_output_size,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        "rope_parameters": {"rope_type": "default", "rope_theta": vision.rope_theta},
        "norm_eps": vision.norm_eps,
        "vision_feature_select_strategy": "default",
        "hidden_act": "gelu",
    }


def _off_where_null(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {**raw, **{name: 0 for name in _NULL_IS_OFF if name in raw and raw[name] is None}}


def _first(given: Value | None, otherwise: Value) -> Value:
    return otherwise if given is None else given
