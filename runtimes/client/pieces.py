"""The pieces in which an answer comes, out of the objects of OpenAI's two streams; nothing in them is believed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

from ...errors import HerdError, shown
from ..generation import Timings, TokenLogprob
from ..generation.sampling import Candidate

UNKNOWN_TOKEN = -1
"""The id of tokens in log-probabilities, where servers tell texts only."""

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """What an answer has grown by.

    Attributes:
        text: may be empty.
        token_ids: empty where the server does not tell them.
        logprobs: of its tokens, where they were asked for.
        finish_reason: why the answer ended, empty while it goes on.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str = ""


def pieces_of(event: Mapping[str, Any]) -> Iterator[Piece]:
    """The piece in an event, none in one that tells the usage only.

    Raises:
        HerdError: a field is of another kind than it should be.
    """
    for choice in _list(event, "choices", dict)[:1]:
        logprobs = _dict(choice, "logprobs")
        delta = _get(choice, "delta", dict, None)
        text = _get(choice, "text", str, "") if delta is None else _get(delta, "content", str, "")
        entries = _chat_logprobs(logprobs) if "content" in logprobs else _completion_logprobs(logprobs)
        reason = _get(choice, "finish_reason", str, "")
        if not re.fullmatch(r"[a-z_]{0,32}", reason):
            raise HerdError(f"the server sent the finish_reason {shown(reason)}, which is none")
        yield Piece(text, tuple(_list(choice, "token_ids", int)), tuple(entries), reason)


def tell_usage(event: Mapping[str, Any], timings: Timings) -> None:
    """Write down the numbers of tokens where an event tells them.

    Raises:
        HerdError: a field is of another kind than it should be.
    """
    if usage := _dict(event, "usage"):
        timings.prompt_tokens = _get(usage, "prompt_tokens", int, 0)
        timings.new_tokens = _get(usage, "completion_tokens", int, timings.new_tokens)
        timings.cached_tokens = _get(_dict(usage, "prompt_tokens_details"), "cached_tokens", int, 0)


def _chat_logprobs(told: Mapping[str, Any]) -> Iterator[TokenLogprob]:
    for entry in _list(told, "content", dict):
        chosen = _candidate(entry)
        top = tuple(map(_candidate, _list(entry, "top_logprobs", dict)))
        yield TokenLogprob(UNKNOWN_TOKEN, chosen.text, chosen.logprob, top)


def _candidate(entry: Mapping[str, Any]) -> Candidate:
    return Candidate(UNKNOWN_TOKEN, _get(entry, "token", str, ""), _number(_get(entry, "logprob", (int, float), 0.0)))


def _completion_logprobs(told: Mapping[str, Any]) -> Iterator[TokenLogprob]:
    """Entries from lists side by side."""
    lists = (_list(told, "tokens", str), _list(told, "token_logprobs", (int, float)),
             _list(told, "top_logprobs", (dict, type(None))))
    for text, logprob, top in zip_longest(*lists):
        ranked = sorted((top or {}).items(), key=lambda pair: -_number(pair[1]))
        found = tuple(Candidate(UNKNOWN_TOKEN, other, _number(value)) for other, value in ranked)
        yield TokenLogprob(UNKNOWN_TOKEN, text or "", _number(logprob), found)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise HerdError(f"the server sent the log-probability {shown(value)}, which is no number")
    return float(value)


def _get(source: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: T) -> T:
    """A field, or the default where it is missing or null."""
    value = source.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise HerdError(f"the server sent {name} {shown(value)}, which is of the wrong kind")
    return value  # type: ignore[return-value]


def _dict(source: Mapping[str, Any], name: str) -> dict[str, Any]:
    return _get(source, name, dict, {})


def _list(source: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> list[Any]:
    """A list in which all is of one kind, empty where it is missing or null."""
    values: list[Any] = _get(source, name, list, [])
    if wrong := [value for value in values if not isinstance(value, kind)]:
        raise HerdError(f"the server sent {shown(wrong[0])} among {name}, which is of the wrong kind")
    return values
