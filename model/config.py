"""What a Llama 4 model is made of, read from Hugging Face's ``config.json`` or Meta's ``params.json``. Torch-free.

Three traps of published files are resolved here once, so that nobody else has to know them:

* ``no_rope_layers`` is a list of *uses RoPE* flags (1 = RoPE), and an empty list means "derive from the interval":
  layer i (0-based) has no positional encoding when ``(i + 1) % no_rope_layer_interval == 0``;
* ``attn_temperature_tuning`` may be the integer 4 and means "on"; ``attention_chunk_size`` may be null and means
  "no chunks, every layer attends to everything";
* ``intermediate_size`` is the width of an expert and of the shared expert, ``intermediate_size_mlp`` of a dense layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import HerdError

JsonObject = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3 frequency scaling (llama-models ``apply_scaling``): long wavelengths are divided by ``factor``."""

    factor: float = 16.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The decoder. Lists are per layer; widths are in elements, lengths in tokens."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    expert_size: int
    """Width of one routed expert and of the shared expert (HF ``intermediate_size``)."""
    dense_size: int
    """Width of the feed-forward of layers without experts (HF ``intermediate_size_mlp``)."""
    num_experts: int = 0
    top_k: int = 1
    moe_layers: tuple[int, ...] = ()
    rope_layers: tuple[bool, ...] = ()
    """True where a layer rotates queries and keys; the others have no positional encoding (iRoPE)."""
    chunked_layers: tuple[bool, ...] = ()
    """True where a layer attends only inside its block of ``attention_chunk_size`` tokens."""
    attention_chunk_size: int = 0
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    use_qk_norm: bool = False
    attn_temperature_tuning: bool = False
    floor_scale: float = 8192.0
    attn_scale: float = 0.1
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 131072
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        _require(self.num_heads % self.num_kv_heads == 0, f"{self.num_heads} attention heads cannot share "
                 f"{self.num_kv_heads} key/value heads evenly")
        _require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd, RoPE rotates pairs")
        for name in ("rope_layers", "chunked_layers"):
            found = len(getattr(self, name))
            _require(found == self.num_layers, f"{name} has {found} entries for {self.num_layers} layers")
        _require(all(0 <= i < self.num_layers for i in self.moe_layers),
                 f"moe_layers {list(self.moe_layers)} names layers outside 0..{self.num_layers - 1}")
        if self.moe_layers:
            _require(1 <= self.top_k <= self.num_experts,
                     f"num_experts_per_tok {self.top_k} is not within 1..{self.num_experts} experts")

    def chunk_of(self, layer: int) -> int:
        """Attention chunk of a layer in tokens; 0 means the layer attends to the whole past."""
        return self.attention_chunk_size if self.chunked_layers[layer] else 0


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image tower, its pixel-shuffle adapter and the projector into the decoder."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    adapter_hidden_size: int
    """Output width of the adapter's first layer, input of its second (HF ``projector_input_dim``)."""
    adapter_output_size: int
    """Output width of the adapter, input of the projector (HF ``vision_output_dim``)."""
    pixel_shuffle_ratio: float = 0.5
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    num_channels: int = 3

    def __post_init__(self) -> None:
        _require(self.image_size % self.patch_size == 0,
                 f"image size {self.image_size} is not a multiple of patch size {self.patch_size}")
        _require(self.hidden_size % (4 * self.num_heads) == 0,
                 f"vision width {self.hidden_size} does not give {self.num_heads} heads with x and y pairs")
        _require((self.patches_per_side * self.pixel_shuffle_ratio).is_integer(),
                 f"{self.patches_per_side} patches per side cannot be shuffled by {self.pixel_shuffle_ratio}")

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile (24 for the released models)."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Decoder positions that one tile fills (144 for the released models)."""
        return int(self.patches_per_side * self.pixel_shuffle_ratio) ** 2


@dataclass(frozen=True, kw_only=True)
class HerdConfig:
    """A whole model: the decoder and, for multimodal checkpoints, the image tower."""

    text: TextConfig
    vision: VisionConfig | None = None
    image_token_id: int = 200092
    """The ``<|patch|>`` id whose positions image features fill (HF ``image_token_index``)."""
    begin_image_token_id: int = 200080
    end_image_token_id: int = 200081

    @classmethod
    def from_file(cls, directory: Path) -> HerdConfig:
        """Read ``config.json`` (Hugging Face) or ``params.json`` (Meta) of a checkpoint directory.

        Raises:
            HerdError: no such directory or file, not JSON, or not a Llama 4 configuration.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise HerdError(f"{directory} is not a directory: give one with config.json or params.json")
        for name, parse in (("config.json", cls.from_hf), ("params.json", cls.from_meta)):
            path = directory / name
            if path.is_file():
                return parse(_read_json(path))
        raise HerdError(f"{directory} holds neither config.json nor params.json: is it a Llama 4 checkpoint?")

    @classmethod
    def from_hf(cls, raw: JsonObject) -> HerdConfig:
        """Parse the content of a Hugging Face ``config.json``, of the whole model or of its text part alone.

        Raises:
            HerdError: ``model_type`` is not ``llama4`` or ``llama4_text``, or a value is missing or impossible.
        """
        kind = raw.get("model_type")
        if kind not in ("llama4", "llama4_text"):
            raise HerdError(f"model_type is {kind!r}, llama4 or llama4_text is needed: not a Llama 4 checkpoint")
        try:
            if kind == "llama4_text":
                return cls(text=_text_from_hf(raw, tied=raw.get("tie_word_embeddings", False)))
            text = dict(raw.get("text_config") or {})
            tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
            vision = raw.get("vision_config")
            return cls(
                text=_text_from_hf(text, tied=tied),
                vision=_vision_from_hf(vision) if vision else None,
                image_token_id=_first(raw, "image_token_index", "image_token_id", default=200092),
                begin_image_token_id=_first(raw, "boi_token_index", "boi_token_id", default=200080),
                end_image_token_id=_first(raw, "eoi_token_index", "eoi_token_id", default=200081),
            )
        except KeyError as error:
            raise HerdError(f"config.json has no value for {error.args[0]!r}: it is incomplete") from error
        except (TypeError, ValueError) as error:
            raise HerdError(f"config.json has a value that cannot be read: {error}") from error

    @classmethod
    def from_meta(cls, raw: JsonObject) -> HerdConfig:
        """Parse the content of Meta's ``params.json`` (llama-models ``ModelArgs``).

        Raises:
            HerdError: the mixture-of-experts part is missing (an older Llama) or a value is missing.
        """
        if "moe_args" not in raw:
            raise HerdError("params.json has no moe_args: this is not a Llama 4 checkpoint")
        try:
            vision = raw.get("vision_args")
            return cls(text=_text_from_meta(raw), vision=_vision_from_meta(vision) if vision else None)
        except KeyError as error:
            raise HerdError(f"params.json has no value for {error.args[0]!r}: it is incomplete") from error
        except (TypeError, ValueError) as error:
            raise HerdError(f"params.json has a value that cannot be read: {error}") from error

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face ``config.json`` of this model; ``from_hf`` of it gives an equal configuration."""
        text = _text_to_hf(self.text)
        if self.vision is None:
            return {"architectures": ["Llama4ForCausalLM"], **text}
        return {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "text_config": text,
            "vision_config": _vision_to_hf(self.vision, self.text.hidden_size),
            "image_token_index": self.image_token_id,
            "boi_token_index": self.begin_image_token_id,
            "eoi_token_index": self.end_image_token_id,
            "tie_word_embeddings": self.text.tie_word_embeddings,
        }

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary for a bundle's manifest; ``from_json`` restores it."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: JsonObject) -> HerdConfig:
        """Restore what ``to_json`` wrote."""
        text = dict(raw["text"])
        scaling = text.pop("rope_scaling")
        for field in ("moe_layers", "rope_layers", "chunked_layers", "eos_token_ids"):
            text[field] = tuple(text[field])
        rest = {field.name: raw[field.name] for field in fields(cls) if field.name not in ("text", "vision")}
        return cls(
            text=TextConfig(**text, rope_scaling=RopeScaling(**scaling) if scaling else None),
            vision=VisionConfig(**raw["vision"]) if raw["vision"] else None,
            **rest,
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise HerdError(f"impossible configuration: {message}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HerdError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise HerdError(f"{path} holds a {type(content).__name__}, a JSON object is needed")
    return content


def _first(raw: JsonObject, *names: str, default: Any) -> Any:
    return next((raw[name] for name in names if raw.get(name) is not None), default)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list) else (int(value),)


def _rope_from_hf(raw: JsonObject) -> tuple[float, RopeScaling | None]:
    """RoPE theta and scaling: transformers 5 keeps both in ``rope_parameters``, earlier files in two fields."""
    merged = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = float(_first(merged, "rope_theta", default=raw.get("rope_theta") or 500000.0))
    kind = _first(merged, "rope_type", "type", default="default")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise HerdError(f"rope_type is {kind!r}, default or llama3 is what Llama 4 uses")
    names = [field.name for field in fields(RopeScaling)]
    return theta, RopeScaling(**{name: merged[name] for name in names})


def _text_from_hf(raw: JsonObject, *, tied: bool) -> TextConfig:
    layers = int(raw["num_hidden_layers"])
    interval = int(raw.get("no_rope_layer_interval") or 4)
    rope = raw.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(layers)]
    rope = tuple(bool(flag) for flag in rope[:layers])
    types = raw.get("layer_types") or ["chunked_attention" if flag else "full_attention" for flag in rope]
    chunk = int(raw.get("attention_chunk_size", 8192) or 0)
    step = int(raw.get("interleave_moe_layer_step") or 1)
    moe_layers = raw.get("moe_layers")
    theta, scaling = _rope_from_hf(raw)
    heads = int(raw["num_attention_heads"])
    return TextConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
        expert_size=int(raw["intermediate_size"]),
        dense_size=int(raw.get("intermediate_size_mlp", 16384)),
        num_experts=int(raw.get("num_local_experts", 16)),
        top_k=int(raw.get("num_experts_per_tok", 1)),
        moe_layers=tuple(moe_layers) if moe_layers is not None else tuple(range(step - 1, layers, step)),
        rope_layers=rope,
        chunked_layers=tuple(bool(chunk) and kind == "chunked_attention" for kind in types[:layers]),
        attention_chunk_size=chunk,
        rope_theta=theta,
        rope_scaling=scaling,
        use_qk_norm=bool(raw.get("use_qk_norm", True)),
        attn_temperature_tuning=bool(raw.get("attn_temperature_tuning", True)),
        floor_scale=float(raw.get("floor_scale", 8192)),
        attn_scale=float(raw.get("attn_scale", 0.1)),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-5)),
        tie_word_embeddings=bool(tied),
        max_position_embeddings=int(raw.get("max_position_embeddings", 131072)),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=_ids(raw.get("eos_token_id")),
        pad_token_id=raw.get("pad_token_id"),
    )


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


def _vision_from_hf(raw: JsonObject) -> VisionConfig:
    rope = raw.get("rope_parameters") or {}
    return VisionConfig(
        hidden_size=int(raw["hidden_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=int(raw["num_attention_heads"]),
        intermediate_size=int(raw["intermediate_size"]),
        image_size=_side(raw["image_size"]),
        patch_size=_side(raw["patch_size"]),
        adapter_hidden_size=int(raw["projector_input_dim"]),
        adapter_output_size=int(raw["vision_output_dim"]),
        pixel_shuffle_ratio=float(raw.get("pixel_shuffle_ratio", 0.5)),
        rope_theta=float(_first(rope, "rope_theta", default=raw.get("rope_theta") or 10000.0)),
        num_channels=int(raw.get("num_channels", 3)),
    )


def _vision_to_hf(vision: VisionConfig, text_width: int) -> dict[str, Any]:
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


def _side(value: Any) -> int:
    """One side of a square given as a number, a pair or Meta's ``{"height": h, "width": w}``."""
    sides = list(value.values()) if isinstance(value, Mapping) else list(value) if isinstance(value, list) else [value]
    if len(set(sides)) != 1:
        raise HerdError(f"a square is needed for images and patches, found {value}")
    return int(sides[0])


def _text_from_meta(raw: JsonObject) -> TextConfig:
    moe = raw["moe_args"]
    layers, dim, heads = int(raw["n_layers"]), int(raw["dim"]), int(raw["n_heads"])
    interval = raw.get("nope_layer_interval")
    rope = tuple(not interval or (i + 1) % interval != 0 for i in range(layers))
    chunk = int(raw.get("attention_chunk_size") or 0)
    step = int(moe.get("interleave_moe_layer_step", 1))
    dense, expert = _widths_from_meta(raw, moe)
    scaling = None
    if raw.get("use_scaled_rope"):
        high = float(raw.get("rope_high_freq_factor") or 1)
        scaling = RopeScaling(factor=float(raw.get("rope_scaling_factor") or 16), high_freq_factor=high)
    return TextConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(raw.get("n_kv_heads") or heads),
        head_dim=int(raw.get("head_dim") or dim // heads),
        expert_size=expert,
        dense_size=dense,
        num_experts=int(moe["num_experts"]),
        top_k=int(moe.get("top_k", 1)),
        moe_layers=tuple(range(step - 1, layers, step)),
        rope_layers=rope,
        chunked_layers=tuple(bool(chunk) and flag for flag in rope),
        attention_chunk_size=chunk,
        rope_theta=float(raw.get("rope_theta", 500000)),
        rope_scaling=scaling,
        use_qk_norm=bool(raw.get("use_qk_norm", False)),
        attn_temperature_tuning=bool(raw.get("attn_temperature_tuning", False)),
        floor_scale=float(raw.get("floor_scale", 8192)),
        attn_scale=float(raw.get("attn_scale", 0.1)),
        rms_norm_eps=float(raw.get("norm_eps", 1e-5)),
        max_position_embeddings=int(raw.get("max_seq_len", 262144)),
        bos_token_id=200000,
        eos_token_ids=(200001, 200007, 200008),
        pad_token_id=200018,
    )


def _widths_from_meta(raw: JsonObject, moe: JsonObject) -> tuple[int, int]:
    """Dense and expert feed-forward widths by llama-models' rule (``FeedForward`` and ``MoE`` constructors)."""
    dim, multiple = int(raw["dim"]), int(raw.get("multiple_of", 256))
    multiplier = float(raw.get("ffn_dim_multiplier") or 1.0)

    def rounded(width: int) -> int:
        return multiple * -(-width // multiple)

    dense = rounded(int(multiplier * int(2 * (4 * dim) / 3)))
    expert = int(multiplier * int(2 * int(float(raw.get("ffn_exp") or 4.0) * dim) / 3))
    if moe.get("auto_scale_F", True):
        expert = int(expert / (float(moe.get("capacity_factor", 1.0)) + 1))
    return dense, rounded(expert)


def _vision_from_meta(raw: JsonObject) -> VisionConfig:
    return VisionConfig(
        hidden_size=int(raw["dim"]),
        num_layers=int(raw["n_layers"]),
        num_heads=int(raw["n_heads"]),
        intermediate_size=int(raw["dim"] * raw["mlp_ratio"]),
        image_size=_side(raw["image_size"]),
        patch_size=_side(raw["patch_size"]),
        adapter_hidden_size=int(raw["output_dim"]),
        adapter_output_size=int(raw["output_dim"]),
        pixel_shuffle_ratio=float(raw["pixel_shuffle_ratio"]),
    )
