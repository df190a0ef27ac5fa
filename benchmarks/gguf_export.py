"""A Llama 4 checkpoint as a GGUF file for llama.cpp: to compare speed on the same weights.

    python -m benchmarks.gguf_export CHECKPOINT OUT.gguf [--kind {Q8_0,Q4_0,BF16}]

Matrices take the kind asked for, except that Q4_0 keeps the embedding and the head in Q8_0; norms, router and rotary
factors are F32. Weights are read, quantised (by the gguf library) and written tensor by tensor. A byte-level BPE
``tokenizer.json`` becomes the file's vocabulary, which llama.cpp's server needs.

llama.cpp fixes parts of Llama 4 that a configuration can vary: a checkpoint that differs is refused.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from herdgraph.console import run_cli, size, succeed
from herdgraph.errors import HerdError
from herdgraph.model.checkpoint import Checkpoint, open_checkpoint
from herdgraph.model.config import TextConfig
from herdgraph.model.llama4.rope import inverse_frequencies

from .vocabulary import is_special

KINDS = ("Q8_0", "Q4_0", "BF16")
_ATTENTION = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
_SWIGLU = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file, not read yet.

    Attributes:
        name: in the file, without ``.weight``.
        shape: outermost dimension first.
        kind: number format.
        read: its values.
        ours: canonical name of the checkpoint's tensor whose values these are, empty for none.
        columns: of experts, which of the outputs of that tensor.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    read: Callable[[], Tensor]
    ours: str = ""
    columns: slice | None = None

    def data(self) -> np.ndarray:
        """Values in the number format."""
        return gguf.quants.quantize(np.ascontiguousarray(self.read().float().numpy()), self.kind)


def export(checkpoint: Checkpoint, path: Path, kind: Kind) -> None:
    """Write the file.

    Raises:
        HerdError: the model is not one that llama.cpp can run.
    """
    _require_expressible(checkpoint)
    write(checkpoint, path, kind)


def write(checkpoint: Checkpoint, path: Path, kind: Kind) -> None:
    """Write the file of a model that llama.cpp perhaps cannot run; its tools quantise any."""
    text = checkpoint.config.text
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama4")
    _add_metadata(writer, text)
    _add_vocabulary(writer, checkpoint.directory / "tokenizer.json")
    found = list(entries(checkpoint, kind))
    for entry in found:
        stored = gguf.quant_shape_to_byte_shape(entry.shape, entry.kind) if entry.kind != Kind.F32 else entry.shape
        width = 4 if entry.kind == Kind.F32 else 1
        writer.add_tensor_info(f"{entry.name}.weight", stored, np.dtype(np.float32 if width == 4 else np.uint8),
                               width * math.prod(stored), entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in found:
        writer.write_tensor_data(entry.data())
    writer.close()
    partial.replace(path)


def _require_expressible(checkpoint: Checkpoint) -> None:
    """llama.cpp: no image tower here, and these choices are written into its code (src/models/llama4.cpp)."""
    text = checkpoint.config.text
    pattern = tuple((layer + 1) % 4 != 0 for layer in range(text.num_layers))
    fixed = {
        "a model without images": checkpoint.config.vision is None,
        "use_qk_norm unless there are 128 experts": text.use_qk_norm == (text.num_experts != 128),
        "rotation in three layers of four": text.rope_layers == pattern,
        "chunks of 8192 in the same layers": (text.chunked_layers, text.attention_chunk_size) == (pattern, 8192),
        "attn_temperature_tuning with floor_scale 8192 and attn_scale 0.1":
            (text.attn_temperature_tuning, text.floor_scale, text.attn_scale) == (True, 8192, 0.1),
        "experts in every n-th layer": text.moe_layers == tuple(range(_step(text) - 1, text.num_layers, _step(text))),
    }
    wrong = [choice for choice, holds in fixed.items() if not holds]
    if wrong:
        raise HerdError(f"llama.cpp runs {wrong[0]} only: {checkpoint.directory} differs")


def _step(text: TextConfig) -> int:
    return text.moe_layers[0] + 1 if text.moe_layers else 1


def _add_metadata(writer: gguf.GGUFWriter, text: TextConfig) -> None:
    writer.add_context_length(text.max_position_embeddings)
    writer.add_vocab_size(text.vocab_size)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_layers)
    writer.add_feed_forward_length(text.dense_size)
    writer.add_expert_feed_forward_length(text.expert_size)
    writer.add_expert_count(text.num_experts)
    writer.add_expert_used_count(text.top_k)
    writer.add_interleave_moe_layer_step(_step(text))
    writer.add_head_count(text.num_heads)
    writer.add_head_count_kv(text.num_kv_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)


def _add_vocabulary(writer: gguf.GGUFWriter, path: Path) -> None:
    """The tokens of a byte-level BPE tokenizer, if there is one."""
    if not path.exists():
        writer.add_tokenizer_model("no_vocab")
        return
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    kinds = [gguf.TokenType.CONTROL if is_special(word) else gguf.TokenType.NORMAL for word in words]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for add, word in ((writer.add_bos_token_id, "<|begin_of_text|>"), (writer.add_eos_token_id, "<|eot|>")):
        if word in model["vocab"]:
            add(model["vocab"][word])
    writer.add_add_bos_token(False)


def entries(checkpoint: Checkpoint, kind: Kind) -> Iterator[Entry]:
    """All tensors in the order of the model."""
    text = checkpoint.config.text
    edge = Kind.Q8_0 if kind == Kind.Q4_0 else kind
    yield _plain(checkpoint, "token_embd", "embed_tokens.weight", edge)
    if text.rope_scaling:
        yield Entry("rope_freqs", (text.head_dim // 2,), Kind.F32, lambda: _rope_factors(text))
    for layer in range(text.num_layers):
        yield from _layer(checkpoint, layer, kind)
    yield _plain(checkpoint, "output_norm", "norm.weight", Kind.F32)
    if not text.tie_word_embeddings:
        yield _plain(checkpoint, "output", "lm_head.weight", edge)


def _layer(checkpoint: Checkpoint, layer: int, kind: Kind) -> Iterator[Entry]:
    file, ours = f"blk.{layer}", f"layers.{layer}"
    yield _plain(checkpoint, f"{file}.attn_norm", f"{ours}.input_layernorm.weight", Kind.F32)
    for name, part in _ATTENTION.items():  # rows are in interleaved order in both
        yield _plain(checkpoint, f"{file}.{name}", f"{ours}.self_attn.{part}.weight", kind)
    yield _plain(checkpoint, f"{file}.ffn_norm", f"{ours}.post_attention_layernorm.weight", Kind.F32)
    routed = layer in checkpoint.config.text.moe_layers
    parent, suffix = (f"{ours}.feed_forward.shared_expert", "_shexp") if routed else (f"{ours}.feed_forward", "")
    for name, part in _SWIGLU.items():
        yield _plain(checkpoint, f"{file}.{name}{suffix}", f"{parent}.{part}.weight", kind)
    if routed:
        yield _plain(checkpoint, f"{file}.ffn_gate_inp", f"{ours}.feed_forward.router.weight", Kind.F32)
        yield from _experts(checkpoint, file, f"{ours}.feed_forward.experts", kind)


def _experts(checkpoint: Checkpoint, file: str, ours: str, kind: Kind) -> Iterator[Entry]:
    """Experts stacked, each [outputs, inputs]; checkpoints have [inputs, outputs], gate and up side by side."""
    text = checkpoint.config.text
    inner, width, experts = text.expert_size, text.hidden_size, text.num_experts
    for name, columns in (("ffn_gate_exps", slice(inner)), ("ffn_up_exps", slice(inner, None))):
        yield Entry(f"{file}.{name}", (experts, inner, width), kind,
                    lambda columns=columns: checkpoint.read(f"{ours}.gate_up_proj")[..., columns].mT,
                    f"{ours}.gate_up_proj", columns)
    yield Entry(f"{file}.ffn_down_exps", (experts, width, inner), kind,
                lambda: checkpoint.read(f"{ours}.down_proj").mT, f"{ours}.down_proj", slice(None))


def _plain(checkpoint: Checkpoint, name: str, ours: str, kind: Kind) -> Entry:
    return Entry(name, checkpoint.tensors[ours].shape, kind, lambda: checkpoint.read(ours), ours)


def _rope_factors(text: TextConfig) -> Tensor:
    """What the scaling divides the frequency of each pair by."""
    return inverse_frequencies(replace(text, rope_scaling=None)) / inverse_frequencies(text)


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="Q8_0")
    args = parser.parse_args()
    with open_checkpoint(args.checkpoint) as checkpoint:
        export(checkpoint, args.out, Kind[args.kind])
    succeed("wrote", f"{args.out} ({size(args.out.stat().st_size)})")


if __name__ == "__main__":
    run_cli(main)
