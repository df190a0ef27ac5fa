"""Items of a response: a message with one text, or a call. Each begins, grows and ends, and tells so by events."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from ..generation import TokenLogprob
from .logprobs import chat_logprobs

Event = tuple[str, dict[str, Any]]
"""Its type, and its fields."""


@dataclass
class TextItem:
    """The assistant's message."""

    index: int
    text: str = ""
    status: str = "in_progress"
    logprobs: list[TokenLogprob] = field(default_factory=list)
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")

    def told(self) -> dict[str, Any]:
        """The item as it is now."""
        content = [self._part()] if self.text or self.status != "in_progress" else []
        return {"id": self.id, "type": "message", "role": "assistant", "status": self.status, "content": content}

    def begin(self) -> list[Event]:
        """Events of its beginning."""
        added = {"output_index": self.index, "item": self.told()}
        return [("response.output_item.added", added), ("response.content_part.added", self._place() | {
            "part": self._part()})]

    def grow(self, text: str) -> Event:
        """Add text."""
        self.text += text
        return "response.output_text.delta", self._place() | {"delta": text, "logprobs": []}

    def end(self, status: str) -> list[Event]:
        """Events of its end."""
        self.status = status
        part = self._part()
        return [
            ("response.output_text.done", self._place() | {"text": self.text, "logprobs": part["logprobs"]}),
            ("response.content_part.done", self._place() | {"part": part}),
            ("response.output_item.done", {"output_index": self.index, "item": self.told()})]

    def _part(self) -> dict[str, Any]:
        logprobs = chat_logprobs(self.logprobs, as_ids=False)["content"]
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": logprobs}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}


@dataclass
class CallItem:
    """A call; arguments are JSON text."""

    index: int
    call_id: str
    name: str
    arguments: str = ""
    status: str = "in_progress"
    id: str = field(default_factory=lambda: f"fc_{uuid.uuid4().hex}")

    def told(self) -> dict[str, Any]:
        """The item as it is now."""
        return {"id": self.id, "type": "function_call", "call_id": self.call_id, "name": self.name,
                "arguments": self.arguments, "status": self.status}

    def begin(self) -> list[Event]:
        """Events of its beginning."""
        return [("response.output_item.added", {"output_index": self.index, "item": self.told()})]

    def grow(self, fragment: str) -> Event:
        """Add a piece of its arguments."""
        self.arguments += fragment
        return "response.function_call_arguments.delta", self._place() | {"delta": fragment}

    def end(self, status: str) -> list[Event]:
        """Events of its end."""
        self.status = status
        done = self._place() | {"arguments": self.arguments, "name": self.name}
        return [("response.function_call_arguments.done", done),
                ("response.output_item.done", {"output_index": self.index, "item": self.told()})]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index}
