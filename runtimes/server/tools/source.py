"""Text that arrives in pieces, for readers written as generators: they yield where they need more of it."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from ....errors import HerdError

T = TypeVar("T")
Reading = Generator[None, None, T]
"""Reads from a ``Source`` and returns something; yields whenever the text ends before it can."""


class MalformedError(HerdError):
    """What a call holds is neither JSON nor a Python literal, or it is cut off."""


class Source:
    """Text with a place in it up to which it was read."""

    def __init__(self) -> None:
        self.text, self.at, self.closed = "", 0, False

    def add(self, text: str) -> None:
        """Append what arrived; what was read is forgotten."""
        self.text, self.at = self.text[self.at :] + text, 0

    def peek(self) -> Reading[str]:
        """The next character, empty at the end."""
        while self.at == len(self.text) and not self.closed:
            yield
        return self.text[self.at : self.at + 1]

    def skip_blanks(self) -> Reading[str]:
        """Pass blanks; the next character, empty at the end."""
        while True:
            character = yield from self.peek()
            if not character or character not in " \t\r\n":
                return character
            self.at += 1

    def expect(self, wanted: str) -> Reading[None]:
        """Pass one character.

        Raises:
            MalformedError: another one follows.
        """
        found = yield from self.peek()
        if found != wanted:
            raise MalformedError(f"{found!r} stands where {wanted!r} is needed")
        self.at += 1

    def some(self, count: int) -> Reading[str]:
        """So many characters, fewer at the end; they are not passed."""
        while len(self.text) - self.at < count and not self.closed:
            yield
        return self.text[self.at : self.at + count]

    def run(self, allowed: frozenset[str], most: int) -> Reading[str]:
        """All characters of a set that follow.

        Raises:
            MalformedError: they are too many.
        """
        length = 0
        while True:
            while self.text[self.at + length : self.at + length + 1] in allowed:
                length += 1
            if length > most:
                raise MalformedError(f"a number or a name has more than {most} characters")
            if self.at + length < len(self.text) or self.closed:
                break
            yield
        run = self.text[self.at : self.at + length]
        self.at += length
        return run
