"""Where a call begins in what a model writes.

A call begins at ``[name(`` or at ``{"type": "function", "name": "name", "parameters": `` with the name of a tool that
was offered; everything else is text. The grammar of answers and the parser go by the same rule, so that what the
parser takes for a call is what the grammar made one. Both forms have a largest length: text is held back no longer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from .definitions import LONGEST_NAME, NAME_CHARACTERS

Format = Literal["pythonic", "json"]
"""How a model writes calls: ``[f(a="x"), g()]``, or ``{"type": "function", "name": "f", "parameters": {"a": "x"}}``."""
FORMATS: tuple[Format, ...] = ("pythonic", "json")

BEFORE, AFTER = "<|python_start|>", "<|python_end|>"
"""May stand around calls; most runtimes do not show them."""
MOST_BLANKS = 4


@dataclass(frozen=True)
class Opening:
    """A call that begins: the tool's name, how it is written, and where its arguments start in the text."""

    name: str
    format: Format
    end: int


class Waiting(Exception):  # noqa: N818
    """The text ends where more of it would decide."""


class _Cursor:
    """Reads forward in a text; every method goes on where the last one stopped."""

    def __init__(self, text: str, at: int, closed: bool) -> None:
        self.text, self.at, self._closed = text, at, closed

    def takes(self, wanted: str) -> bool:
        """Whether a text follows, which is then passed."""
        found = self.text[self.at : self.at + len(wanted)]
        if found == wanted:
            self.at += len(wanted)
            return True
        if wanted.startswith(found) and not self._closed:
            raise Waiting
        return False

    def blanks(self, most: int) -> None:
        """Pass blanks and line ends."""
        for _ in range(most):
            if not self.takes(" ") and not self.takes("\n"):
                return

    def name(self, names: Collection[str], end: str) -> str | None:
        """One of some names, passed with what ends it."""
        stop = self.at
        while stop < len(self.text) and stop - self.at <= LONGEST_NAME and self.text[stop] in NAME_CHARACTERS:
            stop += 1
        found = self.text[self.at : stop]
        if stop == len(self.text) and not self._closed and any(name.startswith(found) for name in names):
            raise Waiting
        self.at = stop
        return found if found in names and self.takes(end) else None


def opening_at(
    text: str, at: int, names: Collection[str], formats: Sequence[Format], *, closed: bool
) -> Opening | None:
    """The call that begins at a place.

    Args:
        text: what is there so far.
        at: the place.
        names: of the tools.
        formats: how calls may be written.
        closed: whether no more text comes.

    Raises:
        Waiting: more text would decide.
    """
    cursor = _Cursor(text, at, closed)
    if cursor.takes(BEFORE):
        cursor.blanks(MOST_BLANKS)
    begin = cursor.at
    for form in formats:
        cursor.at = begin
        if name := (_pythonic if form == "pythonic" else _json)(cursor, names):
            return Opening(name, form, cursor.at)
    return None


def following(text: str, at: int, names: Collection[str], format: Format) -> Opening | int | None:  # noqa: A002
    """What stands after a call: another one, the place where the calls end, or None for neither.

    Raises:
        Waiting: more text would decide; an answer that ends here was cut off.
    """
    cursor = _Cursor(text, at, closed=False)
    cursor.blanks(MOST_BLANKS)
    if format == "pythonic":
        if cursor.takes("]"):
            return cursor.at
        name = _following_name(cursor, names)
        return Opening(name, format, cursor.at) if name else None
    cursor.takes(";")
    cursor.blanks(MOST_BLANKS)
    name = _json(cursor, names)
    return Opening(name, format, cursor.at) if name else at


def _pythonic(cursor: _Cursor, names: Collection[str]) -> str | None:
    if not cursor.takes("["):
        return None
    cursor.blanks(MOST_BLANKS)
    return cursor.name(names, "(")


def _following_name(cursor: _Cursor, names: Collection[str]) -> str | None:
    if not cursor.takes(","):
        return None
    cursor.blanks(MOST_BLANKS)
    return cursor.name(names, "(")


def _json(cursor: _Cursor, names: Collection[str]) -> str | None:
    if not cursor.takes("{"):
        return None
    cursor.blanks(1)
    if cursor.takes('"type":'):
        cursor.blanks(1)
        if not cursor.takes('"function",'):
            return None
        cursor.blanks(1)
    if not cursor.takes('"name":'):
        return None
    cursor.blanks(1)
    name = cursor.name(names, '",') if cursor.takes('"') else None
    if name is None:
        return None
    cursor.blanks(1)
    return name if cursor.takes('"parameters":') or cursor.takes('"arguments":') else None
