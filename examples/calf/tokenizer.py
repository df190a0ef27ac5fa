"""A small tokenizer of one's own: byte-level BPE whose special tokens are Llama 4's.

    0 .. v-1                 256 bytes and merges, learned from text cut up by Llama 4's own pattern
    v .. V-22                reserved, when the text has too few merges
    V-21 .. V-1              the named special tokens of Llama 4, in its order

The special tokens stand at the very end, so that their ids follow from V alone and a configuration can be written
before there is a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from herdgraph.errors import HerdError
from herdgraph.files import atomic_directory
from herdgraph.model.processing.chat import META_FORMAT
from herdgraph.model.processing.special import PATTERN, SPECIAL_TOKENS

NAMED_SPECIAL_TOKENS = [token for token in SPECIAL_TOKENS if "reserved" not in token]
_BYTES = 256
_BEGIN, _END, _PAD = "<|begin_of_text|>", "<|eot|>", "<|finetune_right_pad|>"


def special_ids(vocab_size: int) -> dict[str, int]:
    """Ids of the special tokens in a vocabulary of ``vocab_size``."""
    first = vocab_size - len(NAMED_SPECIAL_TOKENS)
    return {token: first + index for index, token in enumerate(NAMED_SPECIAL_TOKENS)}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE.

    Args:
        texts: to learn from.
        vocab_size: of the whole vocabulary, special tokens included; the result has exactly that many ids.

    Raises:
        HerdError: the vocabulary has no room for the bytes and the special tokens.
    """
    least = _BYTES + len(NAMED_SPECIAL_TOKENS)
    if vocab_size < least:
        raise HerdError(f"a vocabulary of {vocab_size} is too small: bytes and special tokens alone are {least}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - len(NAMED_SPECIAL_TOKENS), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    ))
    _add_special_tokens(tokenizer, vocab_size)
    return tokenizer


def save_processor(
    directory: Path, tokenizer: Tokenizer, *, image_size: int, max_patches: int = 4, overwrite: bool = False
) -> None:
    """Write the files that ``PromptProcessor`` and transformers read: tokenizer, chat template and image processor.

    Args:
        directory: to create.
        tokenizer: of ``train_tokenizer``.
        image_size: pixels along a tile.
        max_patches: most tiles of a picture, the global one not counted.
        overwrite: replace a directory with a tokenizer.

    Raises:
        HerdError: the directory exists or cannot be written.
    """
    ids = special_ids(tokenizer.get_vocab_size())
    stops = [ids["<|end_of_text|>"], ids["<|eom|>"], ids[_END]]
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "Llama4Processor", "add_bos_token": True,
            "bos_token": _BEGIN, "eos_token": _END, "pad_token": _PAD, "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {"bos_token_id": ids[_BEGIN], "eos_token_id": stops, "pad_token_id": ids[_PAD]},
        "preprocessor_config.json": {
            "image_processor_type": "Llama4ImageProcessorFast", "processor_class": "Llama4Processor",
            "size": {"height": image_size, "width": image_size}, "max_patches": max_patches,
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resize_to_max_canvas": False,
        },
    }
    with atomic_directory(directory, overwrite=overwrite, mark="tokenizer.json") as temporary:
        tokenizer.save(str(temporary / "tokenizer.json"))
        (temporary / "chat_template.jinja").write_text(META_FORMAT, encoding="utf-8")
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _add_special_tokens(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Fill up to the wanted size, special tokens last, and let the tokenizer begin every text with begin-of-text."""
    missing = vocab_size - len(NAMED_SPECIAL_TOKENS) - tokenizer.get_vocab_size()
    tokens = [*(f"<|reserved_special_token_{index}|>" for index in range(missing)), *NAMED_SPECIAL_TOKENS]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    begin = special_ids(vocab_size)[_BEGIN]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A", pair=f"{_BEGIN} $A $B", special_tokens=[(_BEGIN, begin)]
    )
