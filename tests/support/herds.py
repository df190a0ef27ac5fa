"""Tiny Llama 4 models for tests: one configuration per odd part, with weights that make the part matter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

from herdgraph.model.config import HerdConfig, to_hf
from herdgraph.model.config.presets import TINY


def variant(*, vision: bool = False, **text: Any) -> HerdConfig:
    """TINY with some text fields replaced."""
    config = replace(TINY, text=replace(TINY.text, **text))
    return config if vision else HerdConfig(text=config.text)


def _nope_every(interval: int) -> dict[str, Any]:
    rope = tuple((layer + 1) % interval != 0 for layer in range(4))
    return {"rope_layers": rope, "chunked_layers": rope}


TWO_LAYERS: dict[str, Any] = {
    "num_layers": 2, "moe_layers": (1,), "rope_layers": (True, False), "chunked_layers": (True, False)}
"""A dense layer that rotates and a routed one that does not: enough, where a test is not about the order of layers."""

VARIANTS: dict[str, HerdConfig] = {
    "moe-every-second-layer": variant(),
    "moe-every-layer": variant(moe_layers=(0, 1, 2, 3)),
    "dense": variant(moe_layers=()),
    "no-qk-norm": variant(use_qk_norm=False),
    "no-rope-scaling": variant(rope_scaling=None),
    "nope-every-2nd": variant(**_nope_every(2)),
    "rope-everywhere": variant(rope_layers=(True,) * 4, chunked_layers=(True,) * 4),
    "no-temperature": variant(attn_temperature_tuning=False),
    "temperature-floor-3": variant(floor_scale=3, attn_scale=0.5),
    "chunk-5": variant(attention_chunk_size=5),
    "no-chunks": variant(attention_chunk_size=0, chunked_layers=(False,) * 4),
    "gqa-1": variant(num_heads=2, num_kv_heads=2),
    "gqa-3": variant(num_heads=6, num_kv_heads=2),
    "gqa-4": variant(num_heads=4, num_kv_heads=1),
    "gqa-5": variant(num_heads=5, num_kv_heads=1),
    "1-expert": variant(num_experts=1),
    "7-experts": variant(num_experts=7),
    "16-experts": variant(num_experts=16),
    "128-experts": variant(num_experts=128),
    "top-2": variant(top_k=2),
    "tied": variant(tie_word_embeddings=True),
}


def reference(config: HerdConfig, seed: int = 0) -> torch.nn.Module:
    """transformers' model of a configuration, float32, with seeded weights that give logits of order one."""
    raw = {key: value for key, value in to_hf(config).items() if key not in ("architectures", "model_type")}
    if not config.text.attention_chunk_size:  # published (Llama Guard 4), but transformers cannot build its mask
        raw["attention_chunk_size"] = 8192
    if config.vision:
        model = Llama4ForConditionalGeneration(Llama4Config(**raw))
    else:
        model = Llama4ForCausalLM(Llama4TextConfig(**raw))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        _fill(name, parameter.data, generator, tied=config.text.tie_word_embeddings)
    return model.float().eval()


def _fill(name: str, weight: torch.Tensor, generator: torch.Generator, *, tied: bool) -> None:
    noise = torch.empty_like(weight).normal_(generator=generator)
    if weight.ndim == 1:  # norms near one, biases and the class token near zero: nothing is trivially neutral
        weight.copy_(0.1 * noise + (0.0 if "bias" in name or "class_embedding" in name else 1.0))
        return
    fan_in = weight.shape[1] if ".experts." in name else weight.shape[-1]
    weight.copy_(noise * (1.0 if "embed_tokens" in name and not tied else fan_in**-0.5))


def save(config: HerdConfig, directory: Path, **options: Any) -> torch.nn.Module:
    """Write the reference model of a configuration as a Hugging Face checkpoint and return it."""
    model = reference(config)
    model.save_pretrained(directory, **options)
    if not config.text.attention_chunk_size:
        (directory / "config.json").write_text(json.dumps(to_hf(config)))
    return model


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random ids of TINY's vocabulary below its special tokens."""
    return torch.randint(3, 490, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def logits(model: torch.nn.Module, token_ids: list[int], pixels: torch.Tensor | None = None) -> torch.Tensor:
    """The reference's logits of a whole prompt, [T, V]."""
    images = {} if pixels is None else {"pixel_values": pixels}
    return model(torch.tensor([token_ids]), use_cache=False, **images).logits[0]


SPECIAL = {
    "<pad>": 0, "<|begin_of_text|>": 1, "<|end_of_text|>": 2, "<|patch|>": 500, "<|image_start|>": 501,
    "<|image_end|>": 502, "<|image|>": 503, "<|tile_x_separator|>": 504, "<|tile_y_separator|>": 505,
    "<|header_start|>": 506, "<|header_end|>": 507, "<|eot|>": 508,
}


def write_processor(directory: Path) -> None:
    """A byte-level tokenizer of TINY's 512 ids (byte b is id b + 3) and an image processor for its 28-pixel tiles."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = SPECIAL | {symbol: 3 + index for index, symbol in enumerate(alphabet)}
    for index in range(512):
        if index not in vocabulary.values():
            vocabulary[f"<|reserved_{index}|>"] = index
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in vocabulary if token.startswith("<")
                                  and len(token) > 1])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    processor = {"image_processor_type": "Llama4ImageProcessorFast", "size": {"height": 28, "width": 28},
                 "max_patches": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resize_to_max_canvas": False}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
