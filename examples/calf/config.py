"""The calf: a herd member small enough to train on one CPU, with every part that makes a Llama 4.

A mixture of experts with one shared and one routed expert per token, as in Scout in every layer; chunked attention with
RoPE and, in every fourth layer, global attention without; QK-norm and attention temperature; an image tower with pixel
shuffle. A tile of 64 x 64 pixels is 4 tokens, each of which sees a quarter of it in 16 patches: a caption is mostly
text then, and a step of training holds twice as many pictures as with 16 tokens.
"""

from __future__ import annotations

from herdgraph.model.config import HerdConfig, TextConfig, VisionConfig

from .tokenizer import special_ids

IMAGE_SIZE = 64
CONTEXT = 2048
VOCABULARY = 2048


def calf_config(vocab_size: int = VOCABULARY) -> HerdConfig:
    """The calf, 4.3 M parameters with the default vocabulary: 8.6 MB in bfloat16."""
    ids = special_ids(vocab_size)
    vision = VisionConfig(
        hidden_size=128, num_layers=4, num_heads=4, intermediate_size=512, image_size=IMAGE_SIZE, patch_size=8,
        pixel_shuffle_ratio=0.25, adapter_hidden_size=192, adapter_output_size=192,
    )
    return HerdConfig(
        text=_text(vocab_size), vision=vision, image_token_id=ids["<|patch|>"],
        begin_image_token_id=ids["<|image_start|>"], end_image_token_id=ids["<|image_end|>"],
    )


def _text(vocab_size: int) -> TextConfig:
    ids = special_ids(vocab_size)
    rope = (True, True, True, False)
    return TextConfig(
        vocab_size=vocab_size, hidden_size=192, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=32, expert_size=160,
        dense_size=320, num_experts=4, top_k=1, moe_layers=(0, 1, 2, 3), rope_layers=rope, chunked_layers=rope,
        attention_chunk_size=192, rope_theta=10000.0, use_qk_norm=True, attn_temperature_tuning=True, floor_scale=256,
        max_position_embeddings=CONTEXT, bos_token_id=ids["<|begin_of_text|>"],
        eos_token_ids=(ids["<|end_of_text|>"], ids["<|eom|>"], ids["<|eot|>"]),
        pad_token_id=ids["<|finetune_right_pad|>"],
    )
