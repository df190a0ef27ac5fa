"""A dense Llama-family model as upcycling sees it: its sizes, its tensors by neutral name, its tokenizer files.

Neutral names, whatever the file calls them (D width, F feed-forward width, N = heads x K, M = key/value heads x K):

    embed_tokens.weight [V, D]         norm.weight [D]                 lm_head.weight [V, D], absent when tied
    layers.{i}.input_layernorm.weight [D]                              layers.{i}.post_attention_layernorm.weight [D]
    layers.{i}.self_attn.q_proj.weight [N, D], k_proj and v_proj [M, D], o_proj [D, N]
    layers.{i}.mlp.gate_proj.weight and up_proj [F, D], down_proj [D, F]

Rows of q_proj and k_proj are in Llama 4's order, where RoPE turns neighbours (2i, 2i+1) of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ...errors import HerdError
from ..checkpoint.finite import require_finite
from ..config import RopeScaling
from ..config.validate import MOST_LAYERS


class TensorSource(Protocol):
    """Tensors of an opened file under neutral names; those without a neutral name keep the file's."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor in the file."""

    def read(self, name: str) -> Tensor:
        """One tensor in float32."""


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """An opened dense model. Widths are in elements, ``context`` in tokens.

    Attributes:
        ffn_size: width F of the feed-forward.
        tied: the embedding is the output head too.
        eos_token_ids: every id that ends a generation, end of turn included.
        tensors: where the weights are read from.
        processor_files: tokenizer, chat template and generation defaults, by the file name they take in a checkpoint.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    tied: bool
    context: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    tensors: TensorSource
    processor_files: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "context"):
            if getattr(self, name) < 1:
                raise HerdError(f"the dense model's {name} is {getattr(self, name)}, it must be at least 1: correct it")
        if not 1 <= self.num_layers <= MOST_LAYERS:  # before lists of that length are made
            raise HerdError(f"the dense model has {self.num_layers} layers, 1 to {MOST_LAYERS} are read: correct it")

    def read(self, name: str) -> Tensor:
        """One tensor by neutral name, float32, read when asked for.

        Raises:
            HerdError: the file is damaged, the tensor holds a NaN or an infinity, or its encoding is not supported.
        """
        values = self.tensors.read(name)
        require_finite(values, name)
        return values

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Neutral name and shape of every tensor that a model of these sizes has."""
        wide, ffn = self.hidden_size, self.ffn_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (wide,),
            "post_attention_layernorm.weight": (wide,),
            "self_attn.q_proj.weight": (queries, wide),
            "self_attn.k_proj.weight": (keys, wide),
            "self_attn.v_proj.weight": (keys, wide),
            "self_attn.o_proj.weight": (wide, queries),
            "mlp.gate_proj.weight": (ffn, wide),
            "mlp.up_proj.weight": (ffn, wide),
            "mlp.down_proj.weight": (wide, ffn),
        }
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, wide), "norm.weight": (wide,)}
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, wide)
        for index in range(self.num_layers):
            shapes.update({f"layers.{index}.{name}": shape for name, shape in layer.items()})
        return shapes
