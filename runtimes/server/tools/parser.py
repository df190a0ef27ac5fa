"""What a model writes, taken apart into text and calls of tools while it is written."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..parts import CallArguments, CallStart, Part, TextPart
from .definitions import checked_tools
from .literals import LiteralReader
from .openings import AFTER, BEFORE, FORMATS, Format, Opening, Waiting, following, opening_at
from .source import MalformedError, Reading, Source


class ToolParser:
    """Takes an answer apart as it comes.

    Text stays text unless it begins a call of a tool that was offered (see ``openings``). Of a call that goes wrong in
    its midst, which a grammar prevents, the arguments stay incomplete, so that nobody takes them for an object, and
    what follows is text. Where an answer is cut between its calls, what was begun of the next one is dropped. The work
    is linear in the length of the answer, however it is cut.

    Args:
        tools: those that were offered, in OpenAI's form or checked.
        formats: how calls may be written; those of one list are written alike.
    """

    def __init__(self, tools: Sequence[Any], formats: Sequence[Format] = FORMATS) -> None:
        self._names = frozenset(tool.name for tool in checked_tools(tools))
        self._formats = formats
        self._begins = frozenset(["[" if form == "pythonic" else "{" for form in formats] + [BEFORE[0]])
        self._source, self._parts = Source(), _Parts()
        self._reading = self._answer()

    def feed(self, text: str) -> list[Part]:
        """Add text; returns what is certain now."""
        self._source.add(text)
        next(self._reading, None)
        return self._parts.taken()

    def finish(self) -> list[Part]:
        """The rest, when nothing more comes."""
        self._source.closed = True
        next(self._reading, None)
        return self._parts.taken()

    def _answer(self) -> Iterator[None]:
        opening = yield from self._text()
        while opening is not None:
            try:
                yield from self._calls(opening)
            except MalformedError:
                pass  # the rest is text
            else:
                yield from self._source.skip_blanks()
            opening = yield from self._text()

    def _text(self) -> Reading[Opening | None]:
        """Pass text up to the next call, None at the end."""
        source = self._source
        while True:
            start, opening = self._next_opening()
            self._parts.text(source.text[source.at : start])
            source.at = opening.end if opening else start
            if opening or source.closed:
                return opening
            yield

    def _next_opening(self) -> tuple[int, Opening | None]:
        """The next call and where it begins; without one, where text begins that may become one."""
        text = self._source.text
        for place in _places(text, self._source.at, self._begins):
            try:
                opening = opening_at(text, place, self._names, self._formats, closed=self._source.closed)
            except Waiting:
                return place, None
            if opening:
                return place, opening
        return len(text), None

    def _calls(self, opening: Opening) -> Reading[None]:
        while True:
            self._parts.start(opening.name)
            reader = LiteralReader(self._source, self._parts.arguments)
            if opening.format == "pythonic":
                yield from reader.keyword_arguments()
            else:
                yield from reader.object()
                yield from self._source.skip_blanks()
                yield from self._source.expect("}")
            after = yield from self._following(opening.format)
            if after is None:
                raise MalformedError("neither another call nor their end")
            if isinstance(after, int):
                self._source.at = after
                break
            opening = after
            self._source.at = opening.end
        if (yield from self._starts_with(AFTER)):
            self._source.at += len(AFTER)

    def _following(self, form: Format) -> Reading[Opening | int | None]:
        source = self._source
        while True:
            try:
                return following(source.text, source.at, self._names, form)
            except Waiting:
                if source.closed:
                    return len(source.text)
                yield

    def _starts_with(self, wanted: str) -> Reading[bool]:
        for length in range(1, len(wanted) + 1):
            if (yield from self._source.some(length)) != wanted[:length]:
                return False
        return True


class _Parts:
    """Gathers parts; pieces of one text and of one call's arguments are joined."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._pieces: list[str] = []
        self._calls = 0

    def text(self, text: str) -> None:
        self._close()
        if text:
            self._parts.append(TextPart(text))

    def start(self, name: str) -> None:
        self._close()
        self._parts.append(CallStart(self._calls, f"call_{uuid.uuid4().hex[:24]}", name))
        self._calls += 1

    def arguments(self, piece: str) -> None:
        self._pieces.append(piece)

    def taken(self) -> list[Part]:
        self._close()
        parts, self._parts = self._parts, []
        return parts

    def _close(self) -> None:
        if fragment := "".join(self._pieces):
            self._parts.append(CallArguments(self._calls - 1, fragment))
        self._pieces = []


def joined(parts: Iterable[Part]) -> list[Part]:
    """Parts of which neighbors are joined where they belong together, as an answer without streaming has them."""
    whole: list[Part] = []
    for part in parts:
        last = whole[-1] if whole else None
        if isinstance(part, TextPart) and isinstance(last, TextPart):
            whole[-1] = TextPart(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments) and last.index == part.index:
            whole[-1] = replace(last, fragment=last.fragment + part.fragment)
        else:
            whole.append(part)
    return whole


def _places(text: str, at: int, wanted: frozenset[str]) -> Iterator[int]:
    """Where one of some characters stands, from a place on."""
    for place in range(at, len(text)):
        if text[place] in wanted:
            yield place
