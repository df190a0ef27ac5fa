"""Reading a dense Llama from a Hugging Face directory: ``config.json``, safetensors in one file or in shards.

These checkpoints store query and key rows for half-split RoPE, where element i of a head turns with element i + K/2;
Llama 4 turns neighbours. The rows are reordered on reading: row i of the first half goes to 2i, of the second to
2i + 1. Scores are sums over a head, so the same order in queries and keys leaves them as they were.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ...errors import HerdError
from ...reading import JSON_BYTES, read_bytes, read_json
from ..checkpoint.base import shortened
from ..checkpoint.huggingface import shards_of
from ..checkpoint.quantized import FLOATS
from ..checkpoint.tensors.header import read_header
from ..checkpoint.tensors.lazy import FileTensor
from ..config import RopeScaling
from ..config.huggingface import rope_from_hf
from ..config.validate import read_section, require_count
from ..processing import GenerationDefaults
from .dense import DenseModel

_PROCESSOR_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json",
)


class _Llama(msgspec.Struct, kw_only=True):
    """A dense decoder; defaults are those of transformers' ``LlamaConfig``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    attention_bias: bool | int = False
    mlp_bias: bool | int = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] = {}
    rope_parameters: dict[str, Any] = {}
    tie_word_embeddings: bool | int = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | list[int] = []
    pad_token_id: int | None = None
    quantization_config: dict[str, Any] = {}


def open_hf(directory: Path) -> DenseModel:
    """Open a Hugging Face directory of ``LlamaForCausalLM``; tensors are read when asked for.

    Raises:
        HerdError: not a dense Llama, a feature that Llama 4 cannot express, or weights that cannot be read.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise HerdError(f"{directory} has no config.json: give a GGUF file or a Hugging Face model directory")
    raw = read_json(path)
    with _errors_name(path):
        llama = _plain_llama(raw)
        require_count("num_attention_heads", llama.num_attention_heads)
        theta, scaling = rope_from_hf(llama.rope_theta, llama.rope_scaling, llama.rope_parameters)
    return _model_of(directory, llama, theta, scaling)


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Put a file's path in front of what is wrong in it."""
    try:
        yield
    except HerdError as error:
        raise HerdError(f"{path}: {error}") from error


def _model_of(directory: Path, llama: _Llama, theta: float, scaling: RopeScaling | None) -> DenseModel:
    heads, tied = llama.num_attention_heads, bool(llama.tie_word_embeddings)
    head_dim = llama.hidden_size // heads if llama.head_dim is None else llama.head_dim
    return DenseModel(
        vocab_size=llama.vocab_size,
        hidden_size=llama.hidden_size,
        num_layers=llama.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=heads if llama.num_key_value_heads is None else llama.num_key_value_heads,
        head_dim=head_dim,
        ffn_size=llama.intermediate_size,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=llama.rms_norm_eps,
        tied=tied,
        context=llama.max_position_embeddings,
        bos_token_id=llama.bos_token_id,
        eos_token_ids=_eos_ids(directory, llama),
        pad_token_id=llama.pad_token_id,
        tensors=HfTensors(directory, head_dim=head_dim, tied=tied),
        processor_files={
            name: read_bytes(directory / name, most=JSON_BYTES) for name in _PROCESSOR_FILES
            if os.path.lexists(directory / name)
        },
    )


class HfTensors:
    """The safetensors files of a directory, under neutral names.

    Args:
        directory: holds ``model.safetensors`` or shards with ``model.safetensors.index.json``.
        head_dim: K, to reorder query and key rows.
        tied: drop the copy of the embedding that some tied checkpoints store as head.

    Raises:
        HerdError: on construction, when a file is missing or damaged.
    """

    def __init__(self, directory: Path, *, head_dim: int, tied: bool) -> None:
        self._head_dim = head_dim
        self._tensors: dict[str, FileTensor] = {}
        for path in shards_of(directory):
            self._add(path)
        if tied:
            self._tensors.pop("lm_head.weight", None)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor in float32; query and key rows come in interleaved order."""
        values = self._tensors[name].read().to(torch.float32)
        return _interleaved(values, self._head_dim) if name.endswith(("q_proj.weight", "k_proj.weight")) else values

    def _add(self, path: Path) -> None:
        for stored, tensor in read_header(path).items():
            # Old checkpoints store a table of frequencies that follows from the configuration.
            if stored.endswith("rotary_emb.inv_freq"):
                continue
            if tensor.dtype not in FLOATS:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise HerdError(f"{path}: {shortened(stored)} is stored as {kind}: give the original, or a GGUF file")
            self._tensors[stored.removeprefix("model.")] = tensor


def _interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder rows [H · K, D] from half-split to interleaved pairs."""
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
    return halves.transpose(1, 2).reshape(rows.shape)


def _plain_llama(raw: Mapping[str, Any]) -> _Llama:
    """The configuration, refused where it has what Llama 4 has not."""
    if raw.get("model_type") != "llama":
        raise HerdError(f"model_type is {raw.get('model_type')!r}, llama is what can be upcycled")
    llama = read_section(raw, _Llama)
    for name in ("attention_bias", "mlp_bias"):
        if getattr(llama, name):
            raise HerdError(f"{name} is set: Llama 4's decoder has no biases, this model cannot be upcycled")
    if llama.hidden_act != "silu":
        raise HerdError(f"hidden_act is {llama.hidden_act!r}, Llama 4's experts use silu")
    if llama.quantization_config:
        raise HerdError("the checkpoint is quantised: give the original, or a GGUF file")
    return llama


def _eos_ids(directory: Path, llama: _Llama) -> tuple[int, ...]:
    """Ids of the configuration, then those that only the generation defaults name, such as the end of a turn."""
    own = llama.eos_token_id if isinstance(llama.eos_token_id, list) else [llama.eos_token_id]
    return tuple(dict.fromkeys((*own, *GenerationDefaults.from_directory(directory).eos_ids)))
