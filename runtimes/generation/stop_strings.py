"""When a generation ends: stop tokens, stop strings, a number of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TypeVar

from ...errors import HerdError, shown

T = TypeVar("T")


@dataclass(frozen=True)
class StopRule:
    """When to end: after these ids, before these strings, or at this many tokens.

    Attributes:
        max_new_tokens: most tokens.
        ids: tokens that end the text.
        strings: texts that end it.
        min_tokens: so many tokens come before any of ``ids``.
        keeps_string: whether the string that ended the text stays in it.
    """

    max_new_tokens: int
    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    min_tokens: int = 0
    keeps_string: bool = False

    @classmethod
    def of(cls, max_new_tokens: int, strings: str | Iterable[str], ids: Iterable[int]) -> StopRule:
        """A rule from what applications give: one stop string or several.

        Raises:
            HerdError: a value is of another kind or impossible.
        """
        listed = [strings] if isinstance(strings, str) else _listed("stop", strings)
        return cls(max_new_tokens, frozenset(_listed("stop_ids", ids)), tuple(listed))

    def __post_init__(self) -> None:
        if not _is_whole(self.max_new_tokens) or self.max_new_tokens < 1:
            raise HerdError(f"max_new_tokens is {shown(self.max_new_tokens)}, it must be a whole number, at least 1")
        for string in self.strings:
            if not isinstance(string, str) or not string:
                raise HerdError(f"a stop string is {shown(string)}, give a text of at least one character")
        for token in self.ids:
            if not _is_whole(token):
                raise HerdError(f"a stop id is {shown(token)}, it must be a whole number")

    def within(self, context: int) -> StopRule:
        """The same rule where only so many tokens are left of the model's context; one token is always possible."""
        return replace(self, max_new_tokens=max(1, min(self.max_new_tokens, context)))


def _listed(name: str, values: Iterable[T]) -> list[T]:
    try:
        return list(values)
    except TypeError as error:
        raise HerdError(f"{name} is {shown(values)}, a list is needed") from error


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class StopStrings:
    """Holds text back while it may be the beginning of a stop string.

    Args:
        strings: end the text.
        keep: whether the string that was met is shown.

    Attributes:
        met: the string that ended the text.
    """

    def __init__(self, strings: Items[str], *, keep: bool = False) -> None:
        self._strings, self._keep = strings, keep
        self._held = ""
        self.met: str | None = None

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string was met (what follows it is dropped)."""
        self._held += text
        found = [(at, stop) for stop in self._strings if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.met = min(found)
            return self._held[: at + len(self.met) * self._keep], True
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
