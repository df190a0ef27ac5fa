"""Reading a dense Llama from a Hugging Face directory: ``config.json``, safetensors in one file or in shards.

These checkpoints store query and key rows for half-split RoPE, where element i of a head turns with element i + K/2;
Llama 4 turns neighbours. The rows are reordered on reading: row i of the first half goes to 2i, of the second to
2i + 1. Scores are sums over a head, so the same order in queries and keys leaves them as they were.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

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
from .dense import DenseModel

_PROCESSOR_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json",
)


def open_hf(directory: Path) -> DenseModel:
    """Open a Hugging Face directory of ``LlamaForCausalLM``; tensors are read when asked for.

    Raises:
        HerdError: not a dense Llama, a feature that Llama 4 cannot express, or weights that cannot be read.
    """
    if not (directory / "config.json").is_file():
        raise HerdError(f"{directory} has no config.json: give a GGUF file or a Hugging Face model directory")
    raw = read_json(directory / "config.json")
    _require_plain_llama(raw)
    try:
        return _model_of(directory, raw)
    except KeyError as error:
        raise HerdError(f"{directory}/config.json has no value for {error.args[0]!r}: it is incomplete") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise HerdError(f"{directory}/config.json has a value of the wrong kind: "
                        "compare it with the original") from error


def _model_of(directory: Path, raw: Mapping[str, Any]) -> DenseModel:
    heads, tied = int(raw["num_attention_heads"]), bool(raw.get("tie_word_embeddings", False))
    head_dim = int(raw.get("head_dim") or raw["hidden_size"] // heads)
    theta, scaling = _rope(raw)
    return DenseModel(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        ffn_size=int(raw["intermediate_size"]),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=tied,
        context=int(raw.get("max_position_embeddings", 2048)),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=_eos_ids(directory, raw),
        pad_token_id=raw.get("pad_token_id"),
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


def _require_plain_llama(raw: Mapping[str, Any]) -> None:
    if raw.get("model_type") != "llama":
        raise HerdError(f"model_type is {raw.get('model_type')!r}, llama is what can be upcycled")
    for name in ("attention_bias", "mlp_bias"):
        if raw.get(name):
            raise HerdError(f"{name} is set: Llama 4's decoder has no biases, this model cannot be upcycled")
    if raw.get("hidden_act", "silu") != "silu":
        raise HerdError(f"hidden_act is {raw['hidden_act']!r}, Llama 4's experts use silu")
    if raw.get("quantization_config"):
        raise HerdError("the checkpoint is quantised: give the original, or a GGUF file")


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling: transformers 5 keeps both in ``rope_parameters``, earlier files in two fields."""
    merged = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = float(merged.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = merged.get("rope_type") or merged.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise HerdError(f"rope_scaling is of type {kind!r}, which Llama 4 cannot express: default and llama3 are")
    return theta, RopeScaling(**{item.name: merged[item.name] for item in fields(RopeScaling)})


def _eos_ids(directory: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of the configuration, then those that only the generation defaults name, such as the end of a turn."""
    path = directory / "generation_config.json"
    sources = [raw, read_json(path)] if path.is_file() else [raw]
    found: list[int] = []
    for source in sources:
        ids = source.get("eos_token_id")
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(dict.fromkeys(found))
