"""When a generation ends: stop tokens, stop strings, a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from ...errors import HerdError


@dataclass(frozen=True)
class StopRule:
    """When to end: after these ids, before these strings, or at this many tokens."""

    max_new_tokens: int
    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise HerdError(f"max_new_tokens is {self.max_new_tokens}, it must be at least 1")
        if "" in self.strings:
            raise HerdError("a stop string is empty, give at least one character")

    def within(self, context: int) -> StopRule:
        """The same rule where only so many tokens are left of the model's context; one token is always possible."""
        return replace(self, max_new_tokens=max(1, min(self.max_new_tokens, context)))


class StopStrings:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, strings: Items[str]) -> None:
        self._strings = strings
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string was met (it and what follows are dropped)."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._strings) if at >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max((self._overlap(stop) for stop in self._strings), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown, False

    def flush(self) -> str:
        """What is still held back."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        sizes = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(stop[:size])), 0)
