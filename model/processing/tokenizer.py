"""Text to token ids and back, from ``tokenizer.json`` or from Meta's ``tokenizer.model``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers

from ...errors import HerdError, TooLongError
from ...reading import panics_refused, read_optional_json
from .codecs import Codec, JsonCodec, MetaCodec
from .generation_defaults import GenerationDefaults
from .messages import require_unicode

STOP_TOKENS = ("<|end_of_text|>", "<|eom|>", "<|eot|>")


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
        self.bos_id = codec.special_tokens.get(token_text(settings, "bos_token") or "<|begin_of_text|>")
        unknown = (token_text(settings, "unk_token"), codec.unknown_token)  # it controls nothing
        self._control = {token: index for token, index in codec.special_tokens.items() if token not in unknown}
        self._control_ids = frozenset(self._control.values())
        self._add_bos = add_bos and self.bos_id is not None
        known = [codec.special_tokens[token] for token in STOP_TOKENS if token in codec.special_tokens]
        self.stop_ids = frozenset((*stop_ids, *known))

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._codec.vocab_size

    @property
    def library(self) -> tokenizers.Tokenizer | tiktoken.Encoding:
        """The library's own object, for other libraries that read it."""
        return self._codec.library

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens."""
        return frozenset(self._codec.special_tokens.values())

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts of all special tokens but the unknown one."""
        return tuple(self._control)

    def control_ids(self, ids: Sequence[int]) -> list[int]:
        """Those of ``ids`` that are control tokens, in their order."""
        return [token for token in ids if token in self._control_ids]

    @property
    def longest_token(self) -> int | None:
        """Bytes of the longest token, None where a text may lose some of its bytes; see ``Codec``."""
        return self._codec.longest_token

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
            HerdError: the text holds half a character, as bytes that are not UTF-8 become in Python; or the library
                fails.
        """
        require_unicode(text)
        with panics_refused("reading the text into tokens"):
            ids = self._codec.encode(text, allow_special=allow_special)
        if not allow_special and not self._control_ids.isdisjoint(ids):
            raise HerdError("the text holds a special token, which this vocabulary cannot spell: leave it out")
        return ids

    def require_room(self, text: str, most_tokens: int | None) -> None:
        """Refuse a text that cannot have as few tokens, before the work is done.

        Raises:
            HerdError: so many characters do not fit into ``most_tokens``.
        """
        longest = self._codec.longest_token
        if most_tokens is None or longest is None or len(text) <= most_tokens * longest:
            return
        raise TooLongError(f"the text has {len(text)} characters, which are more than {len(text) // longest} tokens, "
                           f"at most {most_tokens} are taken: shorten it")

    def encode_completion(self, text: str) -> list[int]:
        """Ids of a raw prompt: special tokens recognised, begin-of-text in front when this tokenizer wants it."""
        ids = self.encode(text, allow_special=True)
        if self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids."""
        with panics_refused("turning tokens into text"):
            return self._codec.decode(ids, skip_special=skip_special)


class StreamDecoder:
    """Tokens in, text out, one at a time; what came out never changes and never ends inside a character.

    ``tokenizers.decoders.DecodeStream`` does the same for ``tokenizer.json`` alone. It is not used, because it gives
    nothing until a character is complete: bytes that never become text stop it for good, what is cut off at the end
    cannot be asked for, and each step decodes again all that waits.

    Args:
        tokenizer: of the tokens.
        skip_special: leave control tokens out.
    """

    _MOST_WAITING = 8
    """Tokens held back at most. A character has up to four bytes and a token at least one: more will never be text."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
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
        before = self._decoded(self._shown)
        return self._decoded(self._shown + self._waiting)[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)


def load_tokenizer(directory: Path, *, eos_ids: Iterable[int] = ()) -> Tokenizer:
    """The tokenizer of a checkpoint or bundle directory.

    Args:
        directory: holds ``tokenizer.json`` or ``tokenizer.model``.
        eos_ids: further stop tokens, those of the model's configuration.

    Raises:
        HerdError: neither file is there, or it cannot be read.
    """
    settings = read_optional_json(directory / "tokenizer_config.json")
    stops = {*eos_ids, *GenerationDefaults.from_directory(directory).eos_ids}
    if (path := directory / "tokenizer.json").exists():
        codec = JsonCodec(path)
        add_bos = settings.get("add_bos_token", codec.puts_tokens_in_front)
        return Tokenizer(codec, settings=settings, add_bos=bool(add_bos), stop_ids=stops)
    if (path := directory / "tokenizer.model").exists():
        return Tokenizer(MetaCodec(path), settings=settings, add_bos=True, stop_ids=stops)
    raise HerdError(
        f"{directory} has no tokenizer.json or tokenizer.model: text needs one; add it to the checkpoint and rebuild, "
        "or work with token ids"
    )


def token_text(settings: Mapping[str, Any], name: str) -> str | None:
    """A token in ``tokenizer_config.json``: a string, or a dictionary with its content.

    Raises:
        HerdError: it is something else.
    """
    value = settings.get(name)
    found = value.get("content") if isinstance(value, dict) else value
    if found is not None and not isinstance(found, str):
        raise HerdError(f"tokenizer_config.json has {name} {value!r:.80}, a text is needed: get it again")
    return found
