"""What was said in a chat: the prompt that continues it, and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .answers import opening, user_turn
from .attachments import Part


@dataclass(frozen=True)
class Attachment:
    """A picture or video that was read, as a part of a message, and the part that names its file."""

    part: Part
    named: Part


@dataclass(frozen=True)
class Turn:
    """A message and its answer.

    Attributes:
        text: of the user.
        attachments: pictures and videos that come before the text.
        answer: of the model, empty until there is one.
    """

    text: str
    attachments: tuple[Attachment, ...] = ()
    answer: str = ""


@dataclass
class Conversation:
    """Messages and answers, in order.

    Attributes:
        system: system message, None for none.
        raw: one text that goes on without a template; every message is appended as it is.
        turns: that have answers.
    """

    system: str | None = None
    raw: bool = False
    turns: list[Turn] = field(default_factory=list)

    def prompt(self, turn: Turn) -> str | list[dict[str, Any]]:
        """What the engine is given to answer a further turn."""
        if self.raw:
            return self._text() + turn.text
        answered = [message for earlier in self.turns for message in _messages(earlier)]
        return [*opening(self.system), *answered, _question(turn)]

    def document(self) -> str:
        """The content of a file: the text when it is raw, else messages as JSON that ``Engine.generate`` takes."""
        if self.raw:
            return self._text()
        said = [message for turn in self.turns for message in _messages(turn, by_name=True)]
        return json.dumps([*opening(self.system), *said], indent=2, ensure_ascii=False) + "\n"

    def _text(self) -> str:
        return "".join(turn.text + turn.answer for turn in self.turns)


def _question(turn: Turn) -> dict[str, Any]:
    return user_turn(turn.text, [attachment.part for attachment in turn.attachments])


def _messages(turn: Turn, *, by_name: bool = False) -> list[dict[str, Any]]:
    """A question and its answer; pictures and videos stand for themselves, or in a file by their names."""
    question = _question(turn)
    if by_name and turn.attachments:
        named = [attachment.named for attachment in turn.attachments]
        question["content"] = [*named, {"type": "text", "text": turn.text}]
    return [question, {"role": "assistant", "content": turn.answer}]
