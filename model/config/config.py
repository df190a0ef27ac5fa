"""What a Llama 4 model is made of, in numbers. Torch-free.

The configuration of a published checkpoint is read by ``read_config``; ``huggingface.py`` and ``meta.py`` know the two
kinds of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .validate import check_fields, exact_fields, require


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3 frequency scaling (llama-models ``apply_scaling``): long wavelengths are divided by ``factor``."""

    factor: float = 16.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        check_fields(self, positive=[field.name for field in fields(self)])


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
        check_fields(self, positive=(
            "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "expert_size",
            "dense_size", "rope_theta", "rms_norm_eps", "max_position_embeddings",
        ))
        require(self.floor_scale > 0 or not self.attn_temperature_tuning,
                 f"floor_scale is {self.floor_scale}, it must be above 0")
        require(self.attention_chunk_size >= 0 and (self.attention_chunk_size or not any(self.chunked_layers)),
                 f"attention_chunk_size is {self.attention_chunk_size}, it must be at least 1, or null for no chunks")
        require(self.num_heads % self.num_kv_heads == 0, f"{self.num_heads} attention heads cannot share "
                 f"{self.num_kv_heads} key/value heads evenly")
        require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd, RoPE rotates pairs")
        for name in ("rope_layers", "chunked_layers"):
            found = len(getattr(self, name))
            require(found == self.num_layers, f"{name} has {found} entries for {self.num_layers} layers")
        require(all(0 <= i < self.num_layers for i in self.moe_layers),
                 f"moe_layers {list(self.moe_layers)} names layers outside 0..{self.num_layers - 1}")
        if self.moe_layers:
            require(1 <= self.top_k <= self.num_experts,
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
        check_fields(self, positive=[field.name for field in fields(self)])
        require(self.image_size % self.patch_size == 0,
                 f"image size {self.image_size} is not a multiple of patch size {self.patch_size}")
        require(self.hidden_size % (4 * self.num_heads) == 0,
                 f"vision width {self.hidden_size} does not give {self.num_heads} heads with x and y pairs")
        require(self.pixel_shuffle_ratio <= 1 and self.patches_per_side * self.pixel_shuffle_ratio % 1 == 0,
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
        check_fields(self)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary for a bundle's manifest; ``from_json`` restores it."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> HerdConfig:
        """Restore what ``to_json`` wrote.

        Raises:
            HerdError: a value is missing, unknown, of the wrong kind or impossible.
        """
        whole = exact_fields(cls, raw)
        text = exact_fields(TextConfig, whole["text"])
        if text["rope_scaling"] is not None:
            text["rope_scaling"] = RopeScaling(**exact_fields(RopeScaling, text["rope_scaling"]))
        vision = None if whole["vision"] is None else VisionConfig(**exact_fields(VisionConfig, whole["vision"]))
        return cls(**{**whole, "text": TextConfig(**text), "vision": vision})
