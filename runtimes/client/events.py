"""Server-sent events from lines: the JSON objects that a stream of OpenAI's form consists of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from ...errors import HerdError
from ...reading import parse_json
from .failures import message_of

EVENT_BYTES = 8 << 20
"""Most of one event; the largest real ones carry a hundred log-probabilities for each of many tokens."""
_DONE = b"[DONE]"


class Lines(Protocol):
    """What is read line by line."""

    def readline(self, limit: int, /) -> bytes:
        """A line with its end, at most ``limit`` bytes of it, nothing at the end of all."""


def events(source: Lines, where: str) -> Iterator[dict[str, Any]]:
    """The objects of a stream until it says that it is done.

    Args:
        source: its lines.
        where: it comes from, for messages.

    Raises:
        ConnectionError: the lines end before.
        HerdError: an event is an error, too large, or no JSON object.
    """
    for data in _data(source, where):
        if data == _DONE:
            return
        value = parse_json(data, f"an event of {where}", "is it a server of OpenAI's form?")
        if not isinstance(value, dict):
            raise HerdError(f"{where} sent an event that is no JSON object: is it a server of OpenAI's form?")
        if value.get("error") or value.get("object") == "error":
            raise HerdError(f"{where} failed in the middle of the answer: {message_of(value)[:300]}")
        yield value
    raise ConnectionAbortedError("the connection ended in the middle")


def _data(source: Lines, where: str) -> Iterator[bytes]:
    """The data of each event: its lines, joined; comments, which keep a connection alive, and names are left out."""
    parts, held = list[bytes](), 0
    while line := source.readline(EVENT_BYTES + 1):
        held += len(line)
        if held > EVENT_BYTES:
            raise HerdError(f"{where} sent an event of more than {EVENT_BYTES} bytes")
        content = line.rstrip(b"\r\n")
        if not content:
            if parts:
                yield b"\n".join(parts)
            parts, held = [], 0
        elif content.startswith(b"data:"):
            parts.append(content[5:].removeprefix(b" "))
        elif not parts:
            held = 0
    if parts == [_DONE]:  # any other event that is not complete is none
        yield _DONE
