"""The two tokenizer libraries behind one interface: ``tokenizer.json`` and Meta's ``tokenizer.model``."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers

from ...errors import HerdError
from ...reading import panics_refused, read_bytes
from .special import PATTERN, SPECIAL_TOKENS

MOST_BYTES = 128 << 20
"""Largest vocabulary file; that of the released models has 28 MB."""
LONGEST_RUN = 25_000
"""tiktoken's recursion overflows on longer runs without a break (openai/tiktoken#195)."""
LONGEST_JSON_RUN = 100_000
"""The regular expressions of ``tokenizer.json`` give up, and the library panics, on runs of some million characters."""


class Codec(Protocol):
    """What the two tokenizer libraries have in common.

    Attributes:
        special_tokens: ids by their text.
        vocab_size: number of ids.
        longest_token: bytes of the longest token, so that n bytes have at least n / that many tokens; None where a
            text may lose some of its bytes on the way.
        unknown_token: stands for any character that the vocabulary lacks, None where it lacks none.
        library: the object of the library, for other libraries that read it.
    """

    special_tokens: dict[str, int]
    vocab_size: int
    longest_token: int | None
    unknown_token: str | None
    library: tokenizers.Tokenizer | tiktoken.Encoding

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """Ids of a text, special tokens in it recognised or taken as ordinary characters."""

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of ids, with U+FFFD for incomplete characters."""

    def token_to_id(self, token: str) -> int | None:
        """Id of a token given by its exact text."""


class JsonCodec:
    """``tokenizer.json`` through the ``tokenizers`` library."""

    def __init__(self, path: Path) -> None:
        content = read_bytes(path, most=MOST_BYTES)
        try:
            with panics_refused(f"reading {path}"):
                self._plain = tokenizers.Tokenizer.from_buffer(content)
                self._special = tokenizers.Tokenizer.from_buffer(content)
                # Whether the file's own post-processor adds begin-of-text: it does so even to an empty text.
                self.puts_tokens_in_front = bool(self._special.encode("").ids)
        except HerdError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise HerdError(f"{path} is not a tokenizer.json: {error}") from error
        self._plain.encode_special_tokens = True  # that is, as ordinary text
        self.library: tokenizers.Tokenizer | tiktoken.Encoding = self._special
        added = self._special.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in added.items() if token.special}
        self.vocab_size = self._special.get_vocab_size(with_added_tokens=True)
        self.unknown_token: str | None = getattr(self._special.model, "unk_token", None)
        strips = any(token.lstrip or token.rstrip for token in added.values())
        self.longest_token = None if strips else _longest_token(self._special)

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """See ``Codec``."""
        codec = self._special if allow_special else self._plain
        parts = split_long_runs(text, LONGEST_JSON_RUN)
        return [token for part in parts for token in codec.encode(part, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """See ``Codec``."""
        return str(self._special.decode(list(ids), skip_special_tokens=skip_special))

    def token_to_id(self, token: str) -> int | None:
        """See ``Codec``."""
        return self._special.token_to_id(token)


class MetaCodec:
    """Meta's ``tokenizer.model`` (base64 tokens with ranks) through tiktoken."""

    unknown_token: str | None = None

    def __init__(self, path: Path) -> None:
        try:
            lines = read_bytes(path, most=MOST_BYTES).split(b"\n")
            ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
            self.special_tokens = {token: len(ranks) + index for index, token in enumerate(SPECIAL_TOKENS)}
            with panics_refused(f"reading {path}"):
                self._encoding = tiktoken.Encoding(
                    path.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
                )
        except (ValueError, OverflowError) as error:
            raise HerdError(f"{path} is not a tiktoken vocabulary: {error}") from error
        self.library: tokenizers.Tokenizer | tiktoken.Encoding = self._encoding
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self.longest_token: int | None = max(map(len, (*ranks, *SPECIAL_TOKENS)))
        self._special_ids = frozenset(self.special_tokens.values())

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """See ``Codec``."""
        allowed: Any = "all" if allow_special else set()
        ids: list[int] = []
        for part in split_long_runs(text, LONGEST_RUN):
            ids += self._encoding.encode(part, allowed_special=allowed, disallowed_special=())
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """See ``Codec``."""
        return self._encoding.decode([token for token in ids if not (skip_special and token in self._special_ids)])

    def token_to_id(self, token: str) -> int | None:
        """See ``Codec``."""
        if token in self.special_tokens:
            return self.special_tokens[token]
        try:
            return self._encoding.encode_single_token(token)
        except KeyError:
            return None


def split_long_runs(text: str, longest: int) -> list[str]:
    """Pieces of a text in which nothing runs on without a break for longer."""
    if len(text) < longest:
        return [text]
    cuts = [match.end() for match in re.finditer(rf"\S{{{longest}}}|\s{{{longest}}}", text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True) if start < end]


def _longest_token(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Bytes of the longest token of a vocabulary that spells every text byte by byte, None for other kinds."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    complete = vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    keeps_bytes = isinstance(tokenizer.model, models.BPE) and tokenizer.normalizer is None and complete
    if not keeps_bytes or not _spells_bytes(tokenizer.pre_tokenizer):
        return None
    return max(len(token.encode()) for token in vocabulary)


def _spells_bytes(step: Any) -> bool:
    """Whether a pre-tokenizer leaves every byte where it is and ends in the alphabet of bytes."""
    if step is None:
        return False
    described = json.loads(step.__getstate__())
    steps = described["pretokenizers"] if described["type"] == "Sequence" else [described]
    kept = all(part["type"] in ("ByteLevel", "Digits") or
               (part["type"] == "Split" and part["behavior"] != "Removed") for part in steps)
    return kept and steps[-1]["type"] == "ByteLevel"
