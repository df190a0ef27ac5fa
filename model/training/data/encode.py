"""From a sample to what a model learns of it: token ids, which of them are learned, and tiles.

A document is  begin-of-text · parts · end-of-text,  and all its text is learned. A conversation is what the chat
template makes of it, and only what the assistant says is learned, the token that ends its turn included; what stands
behind the assistant's last turn is left out. Tokens of a picture are never learned: no model has to draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ....errors import HerdError
from ...config import HerdConfig
from ...data.records import IMAGE, Part, Picture, Record
from ...processing import PromptProcessor
from ...processing.messages import checked_messages

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Encoded:
    """A sample as tokens.

    Attributes:
        key: of the sample.
        ids_T: token ids.
        learned_T: whether the model is to predict this token from those before it.
        tiles_NCHW: tiles of all pictures in order, None without pictures.
        is_cut: whether its end is missing.
    """

    key: str
    ids_T: Array
    learned_T: Array
    tiles_NCHW: Array | None = None
    is_cut: bool = False

    def __len__(self) -> int:
        return len(self.ids_T)


@dataclass(frozen=True)
class _Piece:
    """A run of tokens that is cut anywhere, or one picture, which stays whole or goes."""

    ids: Sequence[int]
    learned: Sequence[bool]
    tiles_NCHW: Array | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, count: int) -> _Piece:
        return _Piece(self.ids[:count], self.learned[:count])


class Encoder:
    """Encodes samples by a model's own tokenizer, chat template and image processor.

    Args:
        directory: checkpoint files (tokenizer, template, image processor).
        config: the model.
        max_tokens: longest sample.
        too_long: refuse a longer sample, or cut it; a picture that does not fit goes as a whole.

    Raises:
        HerdError: samples may be longer than the model's context, or a file is missing or broken.
    """

    def __init__(
        self, directory: Path, config: HerdConfig, *, max_tokens: int, too_long: Literal["refuse", "cut"] = "refuse"
    ) -> None:
        if max_tokens > (context := config.text.max_position_embeddings):
            raise HerdError(f"samples may have {max_tokens} tokens, the model's context is {context}: take shorter "
                            "rows, or raise the context first (herdgraph train long-context)")
        self.processor = PromptProcessor(directory, config)
        self.max_tokens, self._too_long = max_tokens, too_long

    def __call__(self, record: Record) -> Encoded:
        """Encode a sample.

        Raises:
            HerdError: a broken picture, a sample that is too long, a role or template that does not fit, or nothing to
                learn; the message begins with the sample's origin.
        """
        try:
            pieces = list(self._conversation(record) if record.turns else self._document(record.document))
            fitted = self._fitted(pieces)
            return _joined(record.key, fitted, is_cut=fitted is not pieces)
        except HerdError as error:
            raise HerdError(f"{record.origin}: {error}") from error

    @property
    def page_tokens(self) -> int:
        """Tokens of a plain text that fit into a sample, between those that begin and end it."""
        return self.max_tokens - sum(map(len, self._document([])))

    def tokens_of(self, text: str) -> int:
        """How many tokens a plain text has."""
        return len(self.processor.tokenizer.encode(text))

    def _document(self, parts: Sequence[Part]) -> Iterator[_Piece]:
        tokenizer = self.processor.tokenizer
        if tokenizer.bos_id is not None:
            yield _Piece([tokenizer.bos_id], [False])
        for part in parts:
            yield self._picture(part) if isinstance(part, Picture) else _learned(tokenizer.encode(self._start(part)))
        end = tokenizer.token_to_id("<|end_of_text|>")
        if end is not None:
            yield _learned([end])

    def _start(self, text: str) -> str:
        """As much of a text as may count, for what lies behind is cut, or refused, before it becomes tokens."""
        tokenizer, longest = self.processor.tokenizer, self.processor.tokenizer.longest_token
        if self._too_long == "refuse":
            tokenizer.require_room(text, self.max_tokens)
        return text if longest is None else text[: (self.max_tokens + 1) * longest]

    def _conversation(self, record: Record) -> Iterator[_Piece]:
        """The rendered messages, with a picture's tokens in place of each placeholder."""
        ids, learned = self._rendered(record)
        pictures = iter(record.pictures)
        placeholder = self.processor.tokenizer.token_to_id(IMAGE)
        start = 0
        for place in [index for index, token in enumerate(ids) if token == placeholder]:
            yield _Piece(ids[start:place], learned[start:place])
            if (picture := next(pictures, None)) is None:
                raise HerdError("the chat template shows more images than the messages have")
            yield self._picture(picture)
            start = place + 1
        yield _Piece(ids[start:], learned[start:])

    def _rendered(self, record: Record) -> tuple[list[int], list[bool]]:
        """Ids of a conversation up to the assistant's last turn, and which of them the assistant said.

        A rendered beginning ends where the assistant's turn begins, and the turn ends with the first token at which
        generation would stop, so that this holds for any template.
        """
        messages = checked_messages([turn.message() for turn in record.turns])
        encode, tokenizer = self.processor.template.encode, self.processor.tokenizer
        # Where too long is refused, a text that cannot fit is refused before it becomes tokens.
        most = self.max_tokens if self._too_long == "refuse" else None
        ids = encode(messages, tokenizer, tools=record.tools or None, most_tokens=most)
        learned, end = [False] * len(ids), 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = encode(messages[:number], tokenizer, tools=record.tools or None)
            if ids[: len(before)] != before:
                raise HerdError("the chat template rewrites earlier turns: what the assistant said is not to be found")
            end = self._end_of_turn(ids, len(before))
            learned[len(before) : end] = [True] * (end - len(before))
        if not end:
            raise HerdError("there is no message of the assistant: there is nothing to learn")
        return ids[:end], learned[:end]

    def _end_of_turn(self, ids: list[int], start: int) -> int:
        stops = self.processor.tokenizer.stop_ids
        for index in range(start, len(ids)):
            if ids[index] in stops:
                return index + 1
        raise HerdError("the chat template does not end the assistant's turn with a stop token")

    def _picture(self, picture: Picture) -> _Piece:
        prepared = self.processor.prepare(IMAGE, images=[picture.source])
        ids = [token for token in prepared.token_ids if token != self.processor.tokenizer.bos_id]
        return _Piece(ids, [False] * len(ids), prepared.pixel_values)

    def _fitted(self, pieces: list[_Piece]) -> list[_Piece]:
        total = sum(map(len, pieces))
        if total <= self.max_tokens:
            return pieces
        if self._too_long == "refuse":
            raise HerdError(f"the sample has {total} tokens, at most {self.max_tokens} are taken: shorten it, or "
                            "choose to cut")
        kept: list[_Piece] = []
        room = self.max_tokens
        for piece in pieces:
            if len(piece) > room:
                kept += [piece.first(room)] if piece.tiles_NCHW is None else []
                break
            kept.append(piece)
            room -= len(piece)
        return kept


def _learned(ids: list[int]) -> _Piece:
    return _Piece(ids, [True] * len(ids))


def _joined(key: str, pieces: list[_Piece], *, is_cut: bool) -> Encoded:
    ids = np.array([token for piece in pieces for token in piece.ids], np.int64)
    learned = np.array([flag for piece in pieces for flag in piece.learned], bool)
    tiles = [piece.tiles_NCHW for piece in pieces if piece.tiles_NCHW is not None]
    if not learned[1:].any():
        raise HerdError("there is nothing to learn: no text, or none that fits")
    return Encoded(key, ids, learned, np.concatenate(tiles) if tiles else None, is_cut)
