"""One answer as it grows: its text, its calls, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..generation import TokenLogprob
from ..scheduler import Delta
from .parts import CallArguments, CallStart, Part, TextPart
from .toolkit import Parser

Finish = Literal["stop", "length", "tool_calls", "error"]


@dataclass
class Call:
    """A call of a tool; arguments are JSON text."""

    id: str
    name: str
    arguments: str = ""

    def to_openai(self) -> dict[str, Any]:
        """As an answer carries it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class Choice:
    """One of the answers to a prompt.

    Attributes:
        index: among them.
        parser: finds calls in its text; None where all is text.
        text: for people.
        calls: by their index.
        token_ids: all, the stop token included.
        logprobs: of them, where they were asked for.
        finish: why it ended, None while it goes on.
        stop_reason: the stop string or token.
    """

    index: int
    parser: Parser | None = None
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    stop_reason: str | int | None = None

    def feed(self, delta: Delta) -> list[Part]:
        """Grow by a delta; returns what is new."""
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        parts = self._parts(delta)
        for part in parts:
            self._add(part)
        if delta.finish_reason:
            called = self.calls and delta.finish_reason == "stop"
            self.finish = "tool_calls" if called else delta.finish_reason
            self.stop_reason = delta.stop_reason
        return parts

    def _parts(self, delta: Delta) -> list[Part]:
        if self.parser is None:
            return [TextPart(delta.text)] if delta.text else []
        parts = self.parser.feed(delta.text) if delta.text else []
        return [*parts, *self.parser.finish()] if delta.finish_reason else parts

    def _add(self, part: Part) -> None:
        if isinstance(part, TextPart):
            self.text += part.text
        elif isinstance(part, CallStart):
            self.calls.append(Call(part.id, part.name))
        elif isinstance(part, CallArguments):
            self.calls[part.index].arguments += part.fragment
