"""Answers that are calls from their first character on, or all text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..parts import Part, TextPart
from .definitions import checked_tools
from .openings import BEFORE, FORMATS, Format, Waiting, opening_at
from .parser import ToolParser


class LeadingCallParser:
    """Takes an answer apart that has a form unless it is calls (see ``structured.FormOrCalls``).

    Within a form, JSON for example, a call may be quoted: only what begins with one is calls.

    Args:
        tools: those that were offered, in OpenAI's form or checked.
        formats: how calls may be written.
    """

    def __init__(self, tools: Sequence[Any], formats: Sequence[Format] = FORMATS) -> None:
        self._calls = ToolParser(tools, formats)
        self._names = frozenset(tool.name for tool in checked_tools(tools))
        self._formats = formats
        self._held = ""
        self._is_text: bool | None = None

    def feed(self, text: str) -> list[Part]:
        """Add text; returns what is certain now."""
        if self._is_text is None:
            self._held += text
            return self._decided(closed=False)
        return self._read(text)

    def finish(self) -> list[Part]:
        """The rest, when nothing more comes."""
        parts = self._decided(closed=True) if self._is_text is None else []
        return parts if self._is_text else [*parts, *self._calls.finish()]

    def _decided(self, *, closed: bool) -> list[Part]:
        held = self._held
        if not held:
            return []
        try:
            self._is_text = held[0] == BEFORE[0] or not opening_at(
                held, 0, self._names, self._formats, closed=closed)
        except Waiting:
            return []
        return self._read(held)

    def _read(self, text: str) -> list[Part]:
        if not self._is_text:
            return self._calls.feed(text)
        return [TextPart(text)] if text else []
