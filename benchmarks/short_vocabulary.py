"""A model that knows only the tokens of some texts: so small students spend their time on layers, not on the head.

A student 128 wide with all 49,152 ids of SmolLM2 spends nine tenths of a step in its head, though a megabyte of text
uses a few thousand of them. Kept are the ids that the texts use and all that their merges are made of: byte-pair
encoding then takes the very steps that it took before, and the texts have the same tokens under other ids. The model's
distribution is its own, given that the next token is one of those.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor

from herdgraph.model.checkpoint import open_checkpoint, save_checkpoint
from herdgraph.model.checkpoint.base import PROCESSOR_FILES
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.names import expected_tensors

_BY_WORD = ("embed_tokens.weight", "lm_head.weight")


def shorten(source: Path, texts: Iterable[Path], output: Path) -> None:
    """Write a checkpoint that knows the tokens of some texts; nothing is done when it is there.

    Args:
        source: checkpoint with a byte-pair ``tokenizer.json``.
        texts: files, read whole.
        output: checkpoint directory.
    """
    if (output / "config.json").is_file():
        return
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    kept = kept_ids(tokenizer, used_words(source / "tokenizer.json", texts))
    with open_checkpoint(source) as checkpoint:
        config = with_ids(checkpoint.config, kept)
        files: dict[str, Path | bytes] = {
            name: source / name for name in PROCESSOR_FILES if (source / name).is_file()}
        files["tokenizer.json"] = json.dumps(shortened(tokenizer, kept)).encode()
        rows = torch.tensor(list(kept))

        def tensor(name: str) -> Tensor:
            whole = checkpoint.read(name)
            return whole[rows] if name in _BY_WORD else whole

        save_checkpoint(output, config, ((name, tensor(name)) for name in expected_tensors(config)),
                        processor_files=files)


def used_words(tokenizer: Path, texts: Iterable[Path]) -> set[str]:
    """The tokens that some texts consist of."""
    encode = Tokenizer.from_file(str(tokenizer)).encode
    return {word for path in texts
            for word in encode(path.read_text(encoding="utf-8"), add_special_tokens=False).tokens}


def kept_ids(tokenizer: Mapping[str, Any], used: set[str]) -> dict[int, int]:
    """New id by old one: special tokens, bytes, the used words and what their merges are made of, in the old order."""
    parts: dict[str, list[str]] = {}
    for first, second in tokenizer["model"]["merges"]:
        parts.setdefault(first + second, []).extend((first, second))
    special = {token["content"] for token in tokenizer["added_tokens"]}
    waiting, words = [*used, *special, *pre_tokenizers.ByteLevel.alphabet()], set[str]()
    while waiting:
        if (word := waiting.pop()) not in words:
            words.add(word)
            waiting += parts.get(word, [])
    ids = sorted(index for word, index in tokenizer["model"]["vocab"].items() if word in words)
    return {old: new for new, old in enumerate(ids)}


def shortened(tokenizer: Mapping[str, Any], kept: Mapping[int, int]) -> dict[str, Any]:
    """``tokenizer.json`` with the kept ids, and the merges that they allow."""
    model = tokenizer["model"]
    words = {word: kept[index] for word, index in model["vocab"].items() if index in kept}
    merges = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= words.keys()]
    added = [token | {"id": kept[token["id"]]} for token in tokenizer["added_tokens"]]
    return {**tokenizer, "added_tokens": added, "model": {**model, "vocab": words, "merges": merges}}


def with_ids(config: HerdConfig, kept: Mapping[int, int]) -> HerdConfig:
    """A configuration with other ids."""
    text = config.text
    one = {name: kept.get(getattr(text, name)) for name in ("bos_token_id", "pad_token_id")}
    return replace(config, text=replace(
        text, vocab_size=len(kept), eos_token_ids=tuple(kept[index] for index in text.eos_token_ids), **one))
