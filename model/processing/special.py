"""The special tokens of Llama 4's vocabulary in id order, for Meta's ``tokenizer.model``, which does not list them.

200,000 ordinary tokens are followed by 2,048 special ones (llama-models ``llama4/tokenizer.py``).
"""

from __future__ import annotations

COUNT = 2048


def _reserved(kind: str, first: int, last: int) -> list[str]:
    return [f"<|{kind}_reserved_special_token_{index}|>" for index in range(first, last + 1)]


_NAMED = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>", *_reserved("text_post_train", 0, 5),
    "<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>", *_reserved("text_post_train", 8, 68),
    "<|image_start|>", "<|image_end|>", *_reserved("vision", 0, 1), "<|tile_x_separator|>", "<|tile_y_separator|>",
    *_reserved("vision", 2, 5), "<|image|>", *_reserved("vision", 6, 6), "<|patch|>", *_reserved("vision", 7, 1047),
    *_reserved("reasoning", 0, 7), "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>",
]

SPECIAL_TOKENS = [*_NAMED, *(f"<|reserved_special_token_{index}|>" for index in range(COUNT - len(_NAMED)))]

# llama-models' O200K_PATTERN, the pre-tokeniser of the vocabulary.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
