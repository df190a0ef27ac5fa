"""Text to token ids and back, from ``tokenizer.json`` or from Meta's ``tokenizer.model``."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tiktoken
import tokenizers

from ...errors import HerdError
from ...reading import read_optional_json
from .special import PATTERN, SPECIAL_TOKENS

STOP_TOKENS = ("<|end_of_text|>", "<|eom|>", "<|eot|>")
_LONG_RUN = re.compile(r"\S{25000}|\s{25000}")
"""tiktoken's recursion overflows on longer runs without a break (openai/tiktoken#195)."""


class Codec(Protocol):
    """What the two tokenizer libraries have in common."""

    special_tokens: dict[str, int]
    vocab_size: int

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """Ids of a text, special tokens in it recognised or taken as ordinary characters."""

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of ids, with U+FFFD for incomplete characters."""

    def token_to_id(self, token: str) -> int | None:
        """Id of a token given by its exact text."""


class JsonCodec:
    """``tokenizer.json`` through the ``tokenizers`` library."""

    def __init__(self, path: Path) -> None:
        try:
            self._plain = tokenizers.Tokenizer.from_file(str(path))
            self._special = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise HerdError(f"{path} is not a tokenizer.json: {error}") from error
        self._plain.encode_special_tokens = True  # that is, as ordinary text
        added = self._special.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in added.items() if token.special}
        self.vocab_size = self._special.get_vocab_size(with_added_tokens=True)
        # Whether the file's own post-processor adds begin-of-text: it does so even to an empty text.
        self.puts_tokens_in_front = bool(self._special.encode("").ids)

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """See ``Codec``."""
        codec = self._special if allow_special else self._plain
        return list(codec.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """See ``Codec``."""
        return str(self._special.decode(list(ids), skip_special_tokens=skip_special))

    def token_to_id(self, token: str) -> int | None:
        """See ``Codec``."""
        return self._special.token_to_id(token)


class MetaCodec:
    """Meta's ``tokenizer.model`` (base64 tokens with ranks) through tiktoken."""

    def __init__(self, path: Path) -> None:
        try:
            lines = path.read_bytes().split(b"\n")
            ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
        except ValueError as error:
            raise HerdError(f"{path} is not a tiktoken vocabulary: {error}") from error
        self.special_tokens = {token: len(ranks) + index for index, token in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self._special_ids = frozenset(self.special_tokens.values())
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """See ``Codec``."""
        allowed: Any = "all" if allow_special else set()
        ids: list[int] = []
        for part in _split_long_runs(text):
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


class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
        bos_id: begin-of-text token, None when the checkpoint has none.
        stop_ids: tokens that end a generation: those of ``generation_config.json`` and of the configuration, and the
            end-of-text, -message and -turn tokens of Llama 4 where they exist.
        settings: content of ``tokenizer_config.json``.
    """

    def __init__(self, codec: Codec, *, settings: dict[str, Any], add_bos: bool, stop_ids: Iterable[int] = ()) -> None:
        self._codec, self.settings = codec, settings
        bos = token_text(settings.get("bos_token")) or "<|begin_of_text|>"
        self.bos_id = codec.special_tokens.get(bos)
        self._add_bos = add_bos and self.bos_id is not None
        known = [codec.special_tokens[token] for token in STOP_TOKENS if token in codec.special_tokens]
        self.stop_ids = frozenset((*stop_ids, *known))

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._codec.vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens."""
        return frozenset(self._codec.special_tokens.values())

    def token_to_id(self, token: str) -> int | None:
        """Id of a token given by its exact text, None when it is not in the vocabulary."""
        return self._codec.token_to_id(token)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text.

        Args:
            text: any text.
            allow_special: recognise special tokens in it. By default they are ordinary characters, so that what a
                user types can never end a turn or begin another.

        Raises:
            HerdError: the text holds half a character, as bytes that are not UTF-8 become in Python.
        """
        _require_unicode(text)
        return self._codec.encode(text, allow_special=allow_special)

    def encode_completion(self, text: str) -> list[int]:
        """Ids of a raw prompt: special tokens recognised, begin-of-text in front when this tokenizer wants it."""
        ids = self.encode(text, allow_special=True)
        if self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids."""
        return self._codec.decode(ids, skip_special=skip_special)

    def contains_special(self, text: str) -> bool:
        """Whether a special token's text occurs in ``text``."""
        return self._special_pattern.search(text) is not None

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        tokens = sorted(self._codec.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


class StreamDecoder:
    """Tokens in, text out, one at a time; what came out never changes and never ends inside a character.

    ``tokenizers.decoders.DecodeStream`` does the same for ``tokenizer.json`` alone. It is not used, because it gives
    nothing until a character is complete: bytes that never become text stop it for good, what is cut off at the end
    cannot be asked for, and each step decodes again all that waits.
    """

    _MOST_WAITING = 8
    """Tokens held back at most. A character has up to four bytes and a token at least one: more will never be text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # decoded with the next ones, as their context
        self._waiting: list[int] = []

    def feed(self, token_id: int) -> str:
        """Add a token; returns the text that is certain now, perhaps nothing."""
        self._waiting.append(token_id)
        text = self._new_text()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._waiting) < self._MOST_WAITING:
            return ""
        # The last tokens stay as context: some tokenizers decode a word by what stands before it (leading spaces).
        self._shown, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """The rest, incomplete characters replaced."""
        text = self._new_text()
        self._shown, self._waiting = self._waiting, []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._waiting)[len(before) :]


def load_tokenizer(directory: Path, *, eos_ids: Iterable[int] = ()) -> Tokenizer:
    """The tokenizer of a checkpoint or bundle directory.

    Args:
        directory: holds ``tokenizer.json`` or ``tokenizer.model``.
        eos_ids: further stop tokens, those of the model's configuration.

    Raises:
        HerdError: neither file is there, or it cannot be read.
    """
    settings = read_optional_json(directory / "tokenizer_config.json")
    generation = read_optional_json(directory / "generation_config.json").get("eos_token_id")
    listed = generation if isinstance(generation, list) else [] if generation is None else [generation]
    stops = {*eos_ids, *listed}
    if (path := directory / "tokenizer.json").is_file():
        codec = JsonCodec(path)
        add_bos = settings.get("add_bos_token", codec.puts_tokens_in_front)
        return Tokenizer(codec, settings=settings, add_bos=bool(add_bos), stop_ids=stops)
    if (path := directory / "tokenizer.model").is_file():
        return Tokenizer(MetaCodec(path), settings=settings, add_bos=True, stop_ids=stops)
    raise HerdError(
        f"{directory} has no tokenizer.json or tokenizer.model: text needs one; add it to the checkpoint and rebuild, "
        "or work with token ids"
    )


def token_text(value: Any) -> str | None:
    """A token in ``tokenizer_config.json`` is a string or a dictionary with its content."""
    return value.get("content") if isinstance(value, dict) else value


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise HerdError(f"the text holds {found!r}, which is no Unicode character: give it in UTF-8") from error


def _split_long_runs(text: str) -> list[str]:
    cuts = [match.end() for match in _LONG_RUN.finditer(text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
