"""Reading a dense Llama from a GGUF file (llama.cpp), through the ``gguf`` library and its dequantisation.

llama.cpp's converter has already permuted the query and key rows of architecture ``llama`` to interleaved pairs,
which is Llama 4's order: they are taken as they are. Frequency scaling of Llama 3.1 and later is not in the metadata
but in the tensor ``rope_freqs.weight``, one divisor per pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import HerdError
from ..config import RopeScaling, TextConfig
from ..llama4.rope import inverse_frequencies
from .dense import DenseModel
from .gguf_fields import field, required
from .gguf_header import check_header
from .gguf_tokenizer import GgufTokenizer

_GLOBAL_NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"


def open_gguf(path: Path) -> DenseModel:
    """Open a GGUF file; tensors are dequantised when they are read.

    Raises:
        HerdError: the ``gguf`` library is missing, or the file is not a whole GGUF file of a dense Llama.
    """
    file = GgufFile(path)
    _require_plain_llama(file)
    heads = file.number("llama.attention.head_count")
    embedding = file.shapes.get("embed_tokens.weight", (0, 0))
    head_dim = file.number("llama.attention.key_length", embedding[-1] // heads)
    theta = field(file.metadata, "llama.rope.freq_base", float) or 10000.0
    tokenizer = GgufTokenizer(file.metadata)
    context = file.number("llama.context_length")
    return DenseModel(
        vocab_size=embedding[0],
        hidden_size=file.number("llama.embedding_length"),
        num_layers=file.number("llama.block_count"),
        num_heads=heads,
        num_kv_heads=file.number("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_size=file.number("llama.feed_forward_length"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, head_dim, theta),
        rms_norm_eps=required(file.metadata, "llama.attention.layer_norm_rms_epsilon", float),
        tied="lm_head.weight" not in file.shapes,
        context=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=tokenizer.eos_token_ids,
        pad_token_id=tokenizer.pad_token_id,
        tensors=file,
        processor_files=tokenizer.files(context),
    )


class GgufFile:
    """A memory-mapped GGUF file: metadata by key, tensors by neutral name.

    Raises:
        HerdError: on construction, for a missing library or a file that is not GGUF or is cut off.
    """

    def __init__(self, path: Path) -> None:
        self._gguf = _library()
        self._path = path
        check_header(path)
        try:
            reader = self._gguf.GGUFReader(path)
            self.metadata: Mapping[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except Exception as error:  # the library checks little: a damaged file raises anything
            raise HerdError(f"{path} cannot be read as GGUF, it is damaged or cut off: {error}") from error
        self._tensors = {_neutral(tensor.name): tensor for tensor in reader.tensors}
        # One divisor per pair of a head, not a weight: the configuration's RopeScaling takes its place.
        self.rope_factors = self._take_rope_factors()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every weight; GGUF itself lists dimensions innermost first."""
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, dequantised to float32.

        Raises:
            HerdError: its quantisation has no decoder in the ``gguf`` library, or it is damaged.
        """
        tensor = self._tensors[name]
        try:
            values = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise HerdError(f"{self._path}: {name} is stored as {tensor.tensor_type.name}, which the gguf library "
                            "cannot decode: use another quantisation") from error
        except Exception as error:
            raise HerdError(f"{self._path}: {name} cannot be decoded, the file is damaged: {error}") from error
        # Torch wants memory of its own, not the read-only map that unquantised tensors come in.
        return torch.from_numpy(np.require(values, np.float32, ["C", "W", "E"]))

    def number(self, key: str, default: int | None = None) -> int:
        """One integer of the metadata, the same for all layers.

        Raises:
            HerdError: the key is missing and has no default, or the value differs per layer or is not positive.
        """
        found = field(self.metadata, key, int) if default is not None else required(self.metadata, key, int)
        value = default if found is None else found
        if value is None or value < 1:
            raise HerdError(f"{self._path}: {key} is {value!r}, one positive number is needed")
        return value

    def _take_rope_factors(self) -> Tensor | None:
        if _ROPE_FREQS not in self._tensors:
            return None
        factors = self.read(_ROPE_FREQS)
        del self._tensors[_ROPE_FREQS]
        if not factors.numel() or not factors.isfinite().all():
            raise HerdError(f"{self._path}: {_ROPE_FREQS} holds no finite numbers, the file is damaged: get it again")
        return factors


def _library() -> ModuleType:
    try:
        import gguf  # noqa: PLC0415  (an extra, and only this reader needs it)
    except ImportError as error:
        raise HerdError("reading GGUF files needs the gguf library: pip install 'herdgraph[build]'") from error
    return gguf


def _neutral(name: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES and parts[3] == "weight":
        return f"layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    return name


def _require_plain_llama(file: GgufFile) -> None:
    metadata = file.metadata
    architecture = required(metadata, "general.architecture", str)
    if architecture != "llama":
        raise HerdError(f"the GGUF architecture is {architecture!r}, llama is what can be upcycled")
    parts, experts = field(metadata, "split.count", int) or 1, field(metadata, "llama.expert_count", int) or 0
    if parts > 1:
        raise HerdError(f"the GGUF file is one of {parts} parts: merge them with gguf-split first")
    if experts > 0:
        raise HerdError(f"the model has {experts} experts already: a dense one is needed")
    scaling = field(metadata, "llama.rope.scaling.type", str) or "none"
    if scaling != "none":
        raise HerdError(f"the GGUF file scales RoPE by {scaling!r}, which Llama 4 cannot express")
    # Checked here, because a file without it has no vocabulary size either.
    if "embed_tokens.weight" not in file.shapes:
        raise HerdError("the GGUF file has no tensor token_embd.weight: is it a vocabulary only?")


def _rope_scaling(file: GgufFile, head_dim: int, theta: float) -> RopeScaling | None:
    """The parameters behind ``rope_freqs.weight``, accepted when they reproduce its factors."""
    rotated = file.number("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise HerdError(f"RoPE turns {rotated} of {head_dim} elements of a head, Llama 4 turns all")
    if file.rope_factors is None:
        return None
    # The file has the factor only; the rest is the same in every Llama 3.1, 3.2 and 3.3.
    scaling = RopeScaling(factor=round(float(file.rope_factors.max()), 3), low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=8192)
    ours = _frequencies(head_dim, theta, None) / _frequencies(head_dim, theta, scaling)
    if ours.shape != file.rope_factors.shape or not torch.allclose(ours, file.rope_factors, rtol=1e-4):
        raise HerdError("rope_freqs.weight is not the frequency scaling of Llama 3.1, which is what Llama 4 has")
    return scaling


def _frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Frequencies of a decoder of which only the rotation matters."""
    return inverse_frequencies(TextConfig(
        vocab_size=1, hidden_size=head_dim, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=head_dim,
        expert_size=1, dense_size=1, rope_layers=(True,), chunked_layers=(False,), rope_theta=theta,
        rope_scaling=scaling,
    ))
