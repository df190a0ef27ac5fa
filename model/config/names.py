"""Canonical tensor names and shapes of a configuration. Torch-free.

Canonical names are Hugging Face's without the decoder's prefix: ``layers.0.self_attn.q_proj.weight``,
``embed_tokens.weight``, ``lm_head.weight``, ``vision_model.…``, ``multi_modal_projector.…``. Graph initializers,
torch parameters and checkpoints all use them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .config import HerdConfig, TextConfig, VisionConfig

Shape = tuple[int, ...]


def expected_tensors(config: HerdConfig) -> dict[str, Shape]:
    """Name and shape of every tensor that a checkpoint of ``config`` holds."""
    text = config.text
    shapes: dict[str, Shape] = {"embed_tokens.weight": (text.vocab_size, text.hidden_size)}
    for layer in range(text.num_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in _decoder_layer(text, layer)}
    shapes["norm.weight"] = (text.hidden_size,)
    if not text.tie_word_embeddings:
        shapes["lm_head.weight"] = (text.vocab_size, text.hidden_size)
    if config.vision:
        shapes |= {f"vision_model.{name}": shape for name, shape in _vision(config.vision)}
        shapes["multi_modal_projector.linear_1.weight"] = (text.hidden_size, config.vision.adapter_output_size)
    return shapes


def norm_before(name: str) -> str | None:
    """The weight of the norm whose output a matrix reads, None where it reads something else.

    Args:
        name: of a matrix of the decoder, the head or the image tower.
    """
    role = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if role == "lm_head":
        return "norm.weight"
    layer = re.match(r"layers\.\d+\.", name)
    if layer is None or role in ("o_proj", "down_proj"):
        return None
    return layer[0] + ("input_layernorm" if ".self_attn." in name else "post_attention_layernorm") + ".weight"


def _decoder_layer(text: TextConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    width, queries, keys = text.hidden_size, text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    yield "input_layernorm.weight", (width,)
    yield "self_attn.q_proj.weight", (queries, width)
    yield "self_attn.k_proj.weight", (keys, width)
    yield "self_attn.v_proj.weight", (keys, width)
    yield "self_attn.o_proj.weight", (width, queries)
    yield "post_attention_layernorm.weight", (width,)
    if layer not in text.moe_layers:
        yield from _swiglu("feed_forward", width, text.dense_size)
        return
    yield "feed_forward.router.weight", (text.num_experts, width)
    yield "feed_forward.experts.gate_up_proj", (text.num_experts, width, 2 * text.expert_size)
    yield "feed_forward.experts.down_proj", (text.num_experts, text.expert_size, width)
    yield from _swiglu("feed_forward.shared_expert", width, text.expert_size)


def _swiglu(prefix: str, width: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (inner, width)
    yield f"{prefix}.up_proj.weight", (inner, width)
    yield f"{prefix}.down_proj.weight", (width, inner)


def _vision(vision: VisionConfig) -> Iterator[tuple[str, Shape]]:
    width, inner = vision.hidden_size, vision.intermediate_size
    yield "class_embedding", (width,)
    yield "positional_embedding_vlm", (vision.patches_per_side**2 + 1, width)
    yield "patch_embedding.linear.weight", (width, vision.num_channels * vision.patch_size**2)
    for name in ("layernorm_pre", "layernorm_post"):
        yield from _with_bias(name, (width,))
    for layer in range(vision.num_layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield from _with_bias(f"{prefix}.self_attn.{name}", (width, width))
        yield from _with_bias(f"{prefix}.mlp.fc1", (inner, width))
        yield from _with_bias(f"{prefix}.mlp.fc2", (width, inner))
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield from _with_bias(f"{prefix}.{name}", (width,))
    shuffled = int(width / vision.pixel_shuffle_ratio**2)
    yield "vision_adapter.mlp.fc1.weight", (vision.adapter_hidden_size, shuffled)
    yield "vision_adapter.mlp.fc2.weight", (vision.adapter_output_size, vision.adapter_hidden_size)


def _with_bias(name: str, weight: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]
