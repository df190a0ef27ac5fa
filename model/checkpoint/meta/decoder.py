"""Meta's names of the decoder's tensors.

Fused ones are undone as llama-models' load hooks do:

* ``wqkv`` holds the rank's rows of q, then k, then v, and carries the attention norm;
* ``mlp.fc1_weight`` holds the rank's gate rows, then its up rows;
* experts are two-dimensional, expert-major: [E · D, F] in, [E · F, D] out; ranks cut F;
* the router is stored [D, E].

The plain names that the hooks produce (``wq``, ``w1``, ``attention_norm``) are read as well. RoPE rows need no
permutation: both layouts rotate interleaved pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ....errors import HerdError
from ...config import TextConfig
from ..quantized import is_float8, scaled
from ..tensors.lazy import LazyTensor, MappedTensor
from ..tensors.views import Concat, Reshaped, Rows, Transposed, Unflatten
from .tensor_parallel_files import TensorParallelFiles, join

Scales = Sequence[Mapping[str, Tensor]]
"""For each rank the FP8 scales by mapped name, ``layers.{i}.feed_forward.experts.{w1,w3,w2}``, each [E, out]."""


def decoder_tensors(files: TensorParallelFiles, text: TextConfig, scales: Scales) -> dict[str, LazyTensor]:
    """The decoder under canonical names.

    Args:
        files: the consolidated files of all ranks.
        text: of ``params.json``.
        scales: empty for full precision.

    Raises:
        HerdError: a tensor or the scale of an FP8 tensor is missing.
    """
    found = {"embed_tokens.weight": files.rows("tok_embeddings.weight"), "norm.weight": files.equal("norm.weight")}
    if not text.tie_word_embeddings:
        found["lm_head.weight"] = files.rows("output.weight")
    for layer in range(text.num_layers):
        at = f"layers.{layer}"
        parts = _attention(files, at, text)
        mixture = layer in text.moe_layers
        parts |= _mixture(files, f"{at}.feed_forward", text, scales) if mixture else _dense(files, f"{at}.feed_forward")
        found |= {f"{at}.{name}": tensor for name, tensor in parts.items()}
    return found


def _attention(files: TensorParallelFiles, at: str, text: TextConfig) -> dict[str, LazyTensor]:
    ffn = f"{at}.feed_forward"
    norms = (f"{ffn}.mlp.layer_norm_weight", f"{ffn}.norm.weight", f"{at}.ffn_norm.weight")
    return {
        "input_layernorm.weight": files.equal(f"{at}.attention.wqkv.layer_norm_weight", f"{at}.attention_norm.weight"),
        "post_attention_layernorm.weight": files.equal(*norms),
        "self_attn.o_proj.weight": files.columns(f"{at}.attention.wo.weight"),
        **_queries_keys_values(files, f"{at}.attention", text),
    }


def _queries_keys_values(files: TensorParallelFiles, at: str, text: TextConfig) -> dict[str, LazyTensor]:
    if not files.has(f"{at}.wqkv.weight"):
        return {f"self_attn.{letter}_proj.weight": files.rows(f"{at}.w{letter}.weight") for letter in "qkv"}
    fused = files.parts(f"{at}.wqkv.weight")
    per_head = fused[0].shape[0] * len(fused) // (text.num_heads + 2 * text.num_kv_heads)
    found, first = {}, 0
    for letter, heads in zip("qkv", (text.num_heads, text.num_kv_heads, text.num_kv_heads), strict=True):
        last = first + heads * per_head // len(fused)
        found[f"self_attn.{letter}_proj.weight"] = join([Rows(part, first, last) for part in fused], 0)
        first = last
    return found


def _dense(files: TensorParallelFiles, ffn: str) -> dict[str, LazyTensor]:
    down = files.columns(f"{ffn}.mlp.fc2_weight", f"{ffn}.w2.weight")
    if not files.has(f"{ffn}.mlp.fc1_weight"):
        return _swiglu("feed_forward", files.rows(f"{ffn}.w1.weight"), files.rows(f"{ffn}.w3.weight"), down)
    fused = files.parts(f"{ffn}.mlp.fc1_weight")
    half = fused[0].shape[0] // 2
    gate = join([Rows(part, 0, half) for part in fused], 0)
    up = join([Rows(part, half, 2 * half) for part in fused], 0)
    return _swiglu("feed_forward", gate, up, down)


def _mixture(files: TensorParallelFiles, ffn: str, text: TextConfig, scales: Scales) -> dict[str, LazyTensor]:
    shared = _swiglu(
        "feed_forward.shared_expert",
        files.rows(f"{ffn}.w_in_shared_FD.weight", f"{ffn}.shared_expert.w1.weight"),
        files.rows(f"{ffn}.w_swiglu_FD.weight", f"{ffn}.shared_expert.w3.weight"),
        files.columns(f"{ffn}.w_out_shared_DF.weight", f"{ffn}.shared_expert.w2.weight"),
    )
    stored = {"w1": "moe_w_in_eD_F", "w3": "moe_w_swiglu_eD_F", "w2": "moe_w_out_eF_D"}
    gates, ups, downs = (
        _experts(files, f"{ffn}.experts.{name}", f"{ffn}.experts.{key}", text.num_experts, scales)
        for key, name in stored.items()
    )
    return {
        "feed_forward.router.weight": Transposed(files.equal(f"{ffn}.router_DE")),
        "feed_forward.experts.gate_up_proj": Concat([*gates, *ups], axis=2),
        "feed_forward.experts.down_proj": join(downs, 1),
        **shared,
    }


def _experts(files: TensorParallelFiles, stored: str, mapped: str, count: int, scales: Scales) -> list[LazyTensor]:
    """Each rank's experts [E, in, out], dequantised where they are FP8: the scale belongs to the outputs."""
    parts: list[LazyTensor] = [Unflatten(part, count) for part in files.parts(stored)]
    if not is_float8(parts[0]):
        return parts
    if not scales or any(mapped not in rank for rank in scales):
        raise HerdError(f"{files.directory}: {stored} is FP8 and fp8_scales_*.pt has no {mapped}: download the scales")
    return [
        scaled(files.directory, stored, part, _per_output(rank[mapped]))
        for part, rank in zip(parts, scales, strict=True)
    ]


def _per_output(scale_EN: Tensor) -> LazyTensor:
    """The scale, which has no axis for the inputs, in the orientation [E, 1, out] of the weights."""
    return Reshaped(MappedTensor(scale_EN), (scale_EN.shape[0], 1, *scale_EN.shape[1:]))


def _swiglu(prefix: str, gate: LazyTensor, up: LazyTensor, down: LazyTensor) -> dict[str, LazyTensor]:
    return {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up, f"{prefix}.down_proj.weight": down}
