"""What a Llama 4 model is made of, read from Hugging Face's ``config.json`` or Meta's ``params.json``. Torch-free.

Three traps of published files are resolved here once, so that nobody else has to know them:

* ``no_rope_layers`` is a list of *uses RoPE* flags (1 = RoPE), and an empty list means "derive from the interval":
  layer i (0-based) has no positional encoding when ``(i + 1) % no_rope_layer_interval == 0``;
* ``attn_temperature_tuning`` may be the integer 4 and means "on"; ``attention_chunk_size`` may be null and means
  "no chunks, every layer attends to everything";
* ``intermediate_size`` is the width of an expert and of the shared expert, ``intermediate_size_mlp`` of a dense layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...errors import HerdError
from ...files import read_json

JsonObject = Mapping[str, Any]

MOST_LAYERS = 10_000
_LARGEST = 1 << 40
"""Above anything real, below what overflows."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3 frequency scaling (llama-models ``apply_scaling``): long wavelengths are divided by ``factor``."""

    factor: float = 16.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        _check_values(self, positive=_names(self))


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
        _check_values(self, positive=(
            "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "expert_size",
            "dense_size", "rope_theta", "rms_norm_eps", "max_position_embeddings",
        ))
        _require(self.floor_scale > 0 or not self.attn_temperature_tuning,
                 f"floor_scale is {self.floor_scale}, it must be above 0")
        _require(self.attention_chunk_size >= 0 and (self.attention_chunk_size or not any(self.chunked_layers)),
                 f"attention_chunk_size is {self.attention_chunk_size}, it must be at least 1, or null for no chunks")
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
        _check_values(self, positive=_names(self))
        _require(self.image_size % self.patch_size == 0,
                 f"image size {self.image_size} is not a multiple of patch size {self.patch_size}")
        _require(self.hidden_size % (4 * self.num_heads) == 0,
                 f"vision width {self.hidden_size} does not give {self.num_heads} heads with x and y pairs")
        _require(self.pixel_shuffle_ratio <= 1 and (self.patches_per_side * self.pixel_shuffle_ratio).is_integer(),
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

    def __post_init__(self) -> None:
        _check_values(self)

    @classmethod
    def from_file(cls, directory: Path) -> HerdConfig:
        """Read ``config.json`` (Hugging Face) or ``params.json`` (Meta) of a checkpoint directory.

        Raises:
            HerdError: no such directory or file, not JSON, or not a Llama 4 configuration.
        """
        directory = Path(directory)
        if not directory.is_dir():
            problem = "is not a directory" if directory.exists() else "does not exist"
            raise HerdError(f"{directory} {problem}: give a checkpoint directory with config.json or params.json")
        for name, parse in (("config.json", cls.from_hf), ("params.json", cls.from_meta)):
            path = directory / name
            if path.is_file():
                return _from_path(path, parse)
        if (directory / "manifest.json").is_file():
            raise HerdError(f"{directory} is a bundle: give the checkpoint that it was built from")
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
            text, vision = _section(raw, "text_config"), _section(raw, "vision_config")
            tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
            return cls(
                text=_text_from_hf(text, tied=tied),
                vision=_vision_from_hf(vision) if vision else None,
                image_token_id=_first(raw, "image_token_index", "image_token_id", default=200092),
                begin_image_token_id=_first(raw, "boi_token_index", "boi_token_id", default=200080),
                end_image_token_id=_first(raw, "eoi_token_index", "eoi_token_id", default=200081),
            )
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise HerdError("config.json has a value of the wrong kind: compare it with the original") from error

    @classmethod
    def from_meta(cls, raw: JsonObject) -> HerdConfig:
        """Parse the content of Meta's ``params.json`` (llama-models ``ModelArgs``).

        Raises:
            HerdError: the mixture-of-experts part is missing (an older Llama) or a value is missing.
        """
        if "moe_args" not in raw:
            raise HerdError("params.json has no moe_args: this is not a Llama 4 checkpoint")
        try:
            vision = _section(raw, "vision_args")
            return cls(text=_text_from_meta(raw), vision=_vision_from_meta(vision) if vision else None)
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise HerdError("params.json has a value of the wrong kind: compare it with the original") from error

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
        """Restore what ``to_json`` wrote.

        Raises:
            HerdError: a value is missing, unknown, of the wrong kind or impossible.
        """
        whole = _values(cls, raw)
        text = _values(TextConfig, whole["text"])
        if text["rope_scaling"] is not None:
            text["rope_scaling"] = RopeScaling(**_values(RopeScaling, text["rope_scaling"]))
        vision = None if whole["vision"] is None else VisionConfig(**_values(VisionConfig, whole["vision"]))
        return cls(**{**whole, "text": TextConfig(**text), "vision": vision})


def _require(condition: object, message: str) -> None:
    if not condition:
        raise HerdError(f"impossible configuration: {message}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_float(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _all(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, tuple) and all(map(fits, value))


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", _is_int),
    "float": ("a finite number", _is_float),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int | None": ("a whole number or null", lambda value: value is None or _is_int(value)),
    "tuple[int, ...]": ("a list of whole numbers", lambda value: _all(value, _is_int)),
    "tuple[bool, ...]": ("a list of true and false", lambda value: _all(value, lambda item: isinstance(item, bool))),
}
"""What a field of each annotation must hold; others are configurations, which check themselves."""


def _names(config: Any) -> list[str]:
    return [field.name for field in fields(config)]


def _check_values(config: Any, *, positive: Sequence[str] = ()) -> None:
    """Check every field by its annotation, whatever file it came from: a wrong kind fails late, in odd places."""
    for field in fields(config):
        value = getattr(config, field.name)
        wanted, fits = _KINDS.get(str(field.type), ("", lambda _: True))
        _require(fits(value), f"{field.name} is {value!r}, {wanted} is needed")
        _require(field.name not in positive or value > 0, f"{field.name} is {value}, it must be above 0")


def _values(kind: Any, raw: object) -> dict[str, Any]:
    """The values of a configuration class in a JSON object, lists as tuples."""
    _require(isinstance(raw, Mapping), f"{kind.__name__} is {raw!r}, a JSON object is needed")
    assert isinstance(raw, Mapping)
    odd = sorted(set(_names(kind)) ^ set(raw))
    _require(not odd, f"{kind.__name__} has {'an unknown' if odd and odd[0] in raw else 'no'} field "
             f"{odd[0] if odd else ''!r}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}


def _from_path(path: Path, parse: Callable[[JsonObject], HerdConfig]) -> HerdConfig:
    raw = read_json(path)
    try:
        return parse(raw)
    except HerdError as error:
        raise HerdError(f"{path}: {str(error).removeprefix(f'{path.name} ')}") from error


def _section(raw: JsonObject, name: str) -> JsonObject:
    """An object inside of an object, empty when it is absent."""
    value = raw.get(name) or {}
    if not isinstance(value, Mapping):
        raise HerdError(f"{name} is a {type(value).__name__}, a JSON object is needed: correct it")
    return value


def _number(raw: JsonObject, name: str, default: float | None = None) -> int | float:
    value = raw.get(name)
    if value is None:
        value = default
    if value is None:
        raise HerdError(f"there is no value for {name!r}: the file is incomplete")
    if not _is_float(value):
        raise HerdError(f"{name} is {value!r}, a number is needed: correct it")
    return value


def _int(raw: JsonObject, name: str, default: int | None = None) -> int:
    value = _number(raw, name, default)
    if value != int(value):
        raise HerdError(f"{name} is {value}, a whole number is needed: correct it")
    return int(value)


def _float(raw: JsonObject, name: str, default: float | None = None) -> float:
    return float(_number(raw, name, default))


def _count(raw: JsonObject, name: str, default: int | None = None, *, most: int = _LARGEST) -> int:
    """A number of things, checked before anything is divided by it or made that often."""
    count = _int(raw, name, default)
    if not 1 <= count <= most:
        raise HerdError(f"{name} is {count}, it must be within 1 and {most}: correct it")
    return count


def _layers(raw: JsonObject, name: str) -> int:
    return _count(raw, name, most=MOST_LAYERS)


def _list(raw: JsonObject, name: str) -> list[Any]:
    """A list, empty when it is absent."""
    value = raw.get(name) or []
    if not isinstance(value, list):
        raise HerdError(f"{name} is {value!r}, a list is needed: correct it")
    return value


def _first(raw: JsonObject, *names: str, default: Any) -> Any:
    return next((raw[name] for name in names if raw.get(name) is not None), default)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _rope_from_hf(raw: JsonObject) -> tuple[float, RopeScaling | None]:
    """RoPE theta and scaling: transformers 5 keeps both in ``rope_parameters``, earlier files in two fields."""
    merged = {**_section(raw, "rope_scaling"), **_section(raw, "rope_parameters")}
    theta = _float(merged, "rope_theta", _float(raw, "rope_theta", 500000.0))
    kind = _first(merged, "rope_type", "type", default="default")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise HerdError(f"rope_type is {kind!r}, default or llama3 is what Llama 4 uses")
    numbers: dict[str, Any] = {field.name: _number(merged, field.name) for field in fields(RopeScaling)}
    return theta, RopeScaling(**numbers)


def _text_from_hf(raw: JsonObject, *, tied: bool) -> TextConfig:
    layers = _layers(raw, "num_hidden_layers")
    interval = _count(raw, "no_rope_layer_interval", 4)
    flags = _list(raw, "no_rope_layers") or [(i + 1) % interval != 0 for i in range(layers)]
    rope = tuple(bool(flag) for flag in flags[:layers])
    types = _list(raw, "layer_types") or ["chunked_attention" if flag else "full_attention" for flag in rope]
    chunk = _int(raw, "attention_chunk_size", 0) if "attention_chunk_size" in raw else 8192
    step = _count(raw, "interleave_moe_layer_step", 1)
    moe_layers = range(step - 1, layers, step) if raw.get("moe_layers") is None else _list(raw, "moe_layers")
    theta, scaling = _rope_from_hf(raw)
    heads = _count(raw, "num_attention_heads")
    return TextConfig(
        vocab_size=_int(raw, "vocab_size"),
        hidden_size=_int(raw, "hidden_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_int(raw, "num_key_value_heads", heads),
        head_dim=_int(raw, "head_dim", _int(raw, "hidden_size") // heads),
        expert_size=_int(raw, "intermediate_size"),
        dense_size=_int(raw, "intermediate_size_mlp", 16384),
        num_experts=_int(raw, "num_local_experts", 16),
        top_k=_int(raw, "num_experts_per_tok", 1),
        moe_layers=tuple(moe_layers),
        rope_layers=rope,
        chunked_layers=tuple(bool(chunk) and kind == "chunked_attention" for kind in types[:layers]),
        attention_chunk_size=chunk,
        rope_theta=theta,
        rope_scaling=scaling,
        use_qk_norm=bool(raw.get("use_qk_norm", True)),
        attn_temperature_tuning=bool(raw.get("attn_temperature_tuning", True)),
        floor_scale=_float(raw, "floor_scale", 8192),
        attn_scale=_float(raw, "attn_scale", 0.1),
        rms_norm_eps=_float(raw, "rms_norm_eps", 1e-5),
        tie_word_embeddings=bool(tied),
        max_position_embeddings=_int(raw, "max_position_embeddings", 131072),
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
    theta = _float(_section(raw, "rope_parameters"), "rope_theta", _float(raw, "rope_theta", 10000.0))
    return VisionConfig(
        hidden_size=_int(raw, "hidden_size"),
        num_layers=_layers(raw, "num_hidden_layers"),
        num_heads=_int(raw, "num_attention_heads"),
        intermediate_size=_int(raw, "intermediate_size"),
        image_size=_side(raw, "image_size"),
        patch_size=_side(raw, "patch_size"),
        adapter_hidden_size=_int(raw, "projector_input_dim"),
        adapter_output_size=_int(raw, "vision_output_dim"),
        pixel_shuffle_ratio=_float(raw, "pixel_shuffle_ratio", 0.5),
        rope_theta=theta,
        num_channels=_int(raw, "num_channels", 3),
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


def _side(raw: JsonObject, name: str) -> int:
    """One side of a square given as a number, a pair or Meta's ``{"height": h, "width": w}``."""
    value = raw.get(name)
    sides = list(value.values()) if isinstance(value, Mapping) else list(value) if isinstance(value, list) else [value]
    if not sides or any(side != sides[0] for side in sides):
        raise HerdError(f"{name} is {value!r}, a square is needed: correct it")
    return _int({name: sides[0]}, name)


def _text_from_meta(raw: JsonObject) -> TextConfig:
    moe = _section(raw, "moe_args")
    layers, dim, heads = _layers(raw, "n_layers"), _int(raw, "dim"), _count(raw, "n_heads")
    interval = _int(raw, "nope_layer_interval", 0)
    rope = tuple(not interval or (i + 1) % interval != 0 for i in range(layers))
    chunk = _int(raw, "attention_chunk_size", 0)
    step = _count(moe, "interleave_moe_layer_step", 1)
    dense, expert = _widths_from_meta(raw, moe)
    scaling = None
    if raw.get("use_scaled_rope"):
        high = _float(raw, "rope_high_freq_factor", 1)
        scaling = RopeScaling(factor=_float(raw, "rope_scaling_factor", 16), high_freq_factor=high)
    return TextConfig(
        vocab_size=_int(raw, "vocab_size"),
        hidden_size=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_int(raw, "n_kv_heads", heads),
        head_dim=_int(raw, "head_dim", dim // heads),
        expert_size=expert,
        dense_size=dense,
        num_experts=_int(moe, "num_experts"),
        top_k=_int(moe, "top_k", 1),
        moe_layers=tuple(range(step - 1, layers, step)),
        rope_layers=rope,
        chunked_layers=tuple(bool(chunk) and flag for flag in rope),
        attention_chunk_size=chunk,
        rope_theta=_float(raw, "rope_theta", 500000),
        rope_scaling=scaling,
        use_qk_norm=bool(raw.get("use_qk_norm", False)),
        attn_temperature_tuning=bool(raw.get("attn_temperature_tuning", False)),
        floor_scale=_float(raw, "floor_scale", 8192),
        attn_scale=_float(raw, "attn_scale", 0.1),
        rms_norm_eps=_float(raw, "norm_eps", 1e-5),
        max_position_embeddings=_int(raw, "max_seq_len", 262144),
        bos_token_id=200000,
        eos_token_ids=(200001, 200007, 200008),
        pad_token_id=200018,
    )


def _widths_from_meta(raw: JsonObject, moe: JsonObject) -> tuple[int, int]:
    """Dense and expert feed-forward widths by llama-models' rule (``FeedForward`` and ``MoE`` constructors)."""
    dim, multiple = _int(raw, "dim"), _count(raw, "multiple_of", 256)
    multiplier = _float(raw, "ffn_dim_multiplier", 1.0)

    def rounded(width: int) -> int:
        return multiple * -(-width // multiple)

    dense = rounded(int(multiplier * int(2 * (4 * dim) / 3)))
    expert = int(multiplier * int(2 * int(_float(raw, "ffn_exp", 4.0) * dim) / 3))
    if moe.get("auto_scale_F", True):
        expert = int(expert / (_float(moe, "capacity_factor", 1.0) + 1))
    return dense, rounded(expert)


def _vision_from_meta(raw: JsonObject) -> VisionConfig:
    return VisionConfig(
        hidden_size=_int(raw, "dim"),
        num_layers=_layers(raw, "n_layers"),
        num_heads=_int(raw, "n_heads"),
        intermediate_size=int(_number(raw, "dim") * _number(raw, "mlp_ratio")),
        image_size=_side(raw, "image_size"),
        patch_size=_side(raw, "patch_size"),
        adapter_hidden_size=_int(raw, "output_dim"),
        adapter_output_size=_int(raw, "output_dim"),
        pixel_shuffle_ratio=_float(raw, "pixel_shuffle_ratio"),
    )
