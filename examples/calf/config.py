"""The calf: a herd member small enough to train on one CPU, with every part that makes a Llama 4.

A mixture of experts with one shared and one routed expert per token, chunked attention with RoPE and, in every fourth
layer, global attention without; QK-norm and attention temperature; an image tower with pixel shuffle. The teacher is
the larger one and, like Maverick, has experts in every second layer; the student, like Scout, in every layer.
Both see tiles of 64 x 64 pixels as 16 tokens, and like Scout and Maverick they share one image tower, which learned
to see before either of them learned to speak.
"""

from __future__ import annotations

import torch

from herdgraph.model.config import HerdConfig, TextConfig, VisionConfig
from herdgraph.model.llama4.model import Llama4

from .tokenizer import special_ids

IMAGE_SIZE = 64
CONTEXT = 2048
VOCABULARY = 2048


def student_config(vocab_size: int = VOCABULARY) -> HerdConfig:
    """The calf itself, 3.6 M parameters with the default vocabulary: 7.3 MB in bfloat16."""
    text = _text(
        vocab_size, hidden_size=192, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=32, expert_size=160,
        dense_size=320, num_experts=4, moe_layers=(0, 1, 2, 3),
    )
    return _whole(text)


def teacher_config(vocab_size: int = VOCABULARY) -> HerdConfig:
    """What the calf learns from, 9.4 M parameters with the default vocabulary."""
    text = _text(
        vocab_size, hidden_size=256, num_layers=8, num_heads=8, num_kv_heads=2, head_dim=32, expert_size=176,
        dense_size=512, num_experts=8, moe_layers=(1, 3, 5, 7),
    )
    return _whole(text)


@torch.no_grad()
def graft(model: Llama4, source: Llama4) -> Llama4:
    """Give a model the image tower of another.

    Where both decoders are equally wide, the projector goes along, and the embeddings that it was aligned with.
    """
    given = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith(("vision.", "decoder.embed_tokens.")) and given[name].shape == parameter.shape:
            parameter.copy_(given[name])
    return model


def _text(
    vocab_size: int, *, hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int,
    expert_size: int, dense_size: int, num_experts: int, moe_layers: tuple[int, ...],
) -> TextConfig:
    ids = special_ids(vocab_size)
    rope = tuple((layer + 1) % 4 != 0 for layer in range(num_layers))
    return TextConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, expert_size=expert_size, dense_size=dense_size,
        num_experts=num_experts, top_k=1, moe_layers=moe_layers, rope_layers=rope, chunked_layers=rope,
        attention_chunk_size=128, rope_theta=10000.0, use_qk_norm=True, attn_temperature_tuning=True, floor_scale=256,
        max_position_embeddings=CONTEXT, bos_token_id=ids["<|begin_of_text|>"],
        eos_token_ids=(ids["<|end_of_text|>"], ids["<|eom|>"], ids["<|eot|>"]),
        pad_token_id=ids["<|finetune_right_pad|>"],
    )


def _whole(text: TextConfig) -> HerdConfig:
    ids = special_ids(text.vocab_size)
    vision = VisionConfig(
        hidden_size=96, num_layers=4, num_heads=3, intermediate_size=384, image_size=IMAGE_SIZE, patch_size=8,
        adapter_hidden_size=192, adapter_output_size=192,
    )
    return HerdConfig(
        text=text, vision=vision, image_token_id=ids["<|patch|>"], begin_image_token_id=ids["<|image_start|>"],
        end_image_token_id=ids["<|image_end|>"],
    )
