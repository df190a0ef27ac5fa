"""A tokenizer for models of random weights, as servers need one: bytes, then two to four letters.

Such models say any token, so every one has to be text: a server sends no event for one without.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_SPECIAL = ("<pad>", "<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>")
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_SPACE = "Ġ"
"""How byte-level tokenizers write a space."""


def write_processor(directory: Path, size: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        directory: of a checkpoint.
        size: of the vocabulary; what letters do not fill is reserved.
    """
    merges = list(itertools.islice(_merges(), max(0, size - len(_SPECIAL) - 256)))
    words = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in merges)]
    words += [f"<|reserved_{index}|>" for index in range(len(words), size)]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words if is_special(word)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def is_special(word: str) -> bool:
    """Whether a token stands for no text."""
    return len(word) > 2 and word.startswith("<") and word.endswith(">")


def _merges() -> Iterator[tuple[str, str]]:
    pairs = list(itertools.product((_SPACE, *_LETTERS), _LETTERS))
    yield from pairs
    for first, second in pairs:
        yield from ((first + second, third) for third in _LETTERS)
    for first, second in pairs:
        yield from ((first + second + third, fourth) for third, fourth in itertools.product(_LETTERS, _LETTERS))
