"""Values as models write them, in JSON or in Python, to JSON: read once, forward, and written as they are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

from .source import MalformedError, Reading, Source

_DEEPEST = 64
_LONGEST_NUMBER = 4300
"""Digits that Python reads; JSON from elsewhere has fewer."""
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-")
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_CONSTANTS = {"true": "true", "True": "true", "false": "false", "False": "false", "null": "null", "None": "null"}
_ORDINARY = re.compile(r"[^\"'\\\x00-\x1f\x7f]+")
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0", "/": "/",
            "\\": "\\", '"': '"', "'": "'", "\n": ""}
_CODES = {"x": 2, "u": 4, "U": 8}


class LiteralReader:
    """Reads values from a source and writes them as JSON.

    Args:
        source: the text.
        write: takes pieces of JSON as soon as they are certain.
    """

    def __init__(self, source: Source, write: Callable[[str], None]) -> None:
        self._source, self._write = source, write

    def keyword_arguments(self) -> Reading[None]:
        """``a="x", b=2)`` or ``**{"a": "x", "b": 2})``, whose bracket was read, as an object.

        Raises:
            MalformedError: it is something else.
        """
        self._write("{")
        yield from self._source.skip_blanks()
        if (yield from self._source.some(2)) != "**":
            yield from self._entries(self._keyword(set()), "=", ")", 0)
            return
        self._source.at += 2
        yield from self._source.skip_blanks()
        yield from self._source.expect("{")
        yield from self._entries(self._key, ":", "}", 0)
        yield from self._source.skip_blanks()
        yield from self._source.expect(")")

    def object(self) -> Reading[None]:
        """An object in JSON or a dictionary.

        Raises:
            MalformedError: it is something else.
        """
        yield from self._source.skip_blanks()
        yield from self._source.expect("{")
        self._write("{")
        yield from self._entries(self._key, ":", "}", 0)

    def _value(self, depth: int) -> Reading[None]:
        first = yield from self._source.skip_blanks()
        if depth == _DEEPEST:
            raise MalformedError(f"a value is nested more than {_DEEPEST} deep")
        if first and first in "\"'":
            yield from self._string()
        elif first == "{":
            self._source.at += 1
            self._write("{")
            yield from self._entries(self._key, ":", "}", depth + 1)
        elif first == "[":
            self._source.at += 1
            yield from self._items(depth + 1)
        else:
            word = yield from self._source.run(_WORD, _LONGEST_NUMBER)
            self._write(_CONSTANTS.get(word) or json_number(word))

    def _entries(self, key: Callable[[], Reading[None]], between: str, close: str, depth: int) -> Reading[None]:
        """Keys with values up to the bracket that closes them."""
        following = ""
        while (yield from self._source.skip_blanks()) != close:
            self._write(following)
            yield from key()
            yield from self._source.skip_blanks()
            yield from self._source.expect(between)
            self._write(": ")
            yield from self._value(depth)
            yield from self._comma(close)
            following = ", "
        self._source.at += 1
        self._write("}")

    def _items(self, depth: int) -> Reading[None]:
        self._write("[")
        following = ""
        while (yield from self._source.skip_blanks()) != "]":
            self._write(following)
            yield from self._value(depth)
            yield from self._comma("]")
            following = ", "
        self._source.at += 1
        self._write("]")

    def _comma(self, close: str) -> Reading[None]:
        if (yield from self._source.skip_blanks()) != close:
            yield from self._source.expect(",")

    def _keyword(self, seen: set[str]) -> Callable[[], Reading[None]]:
        def read() -> Reading[None]:
            name = yield from self._source.run(_NAME, _LONGEST_NUMBER)
            if not name or name in seen:
                raise MalformedError(f"the argument {name!r} is given twice" if name else "an argument has no name")
            seen.add(name)
            self._write(json.dumps(name))

        return read

    def _key(self) -> Reading[None]:
        quote = yield from self._source.peek()
        if not quote or quote not in "\"'":
            raise MalformedError("a key is no text")
        yield from self._string()

    def _string(self) -> Reading[None]:
        quote = yield from self._source.peek()
        self._source.at += 1
        self._write('"')
        while (character := (yield from self._source.peek())) != quote:
            if not character:
                raise MalformedError("a text has no end")
            if ordinary := _ORDINARY.match(self._source.text, self._source.at):
                self._source.at = ordinary.end()
                self._write(ordinary.group())
                continue
            self._source.at += 1
            text = (yield from self._escaped()) if character == "\\" else character
            self._write(json.dumps(text, ensure_ascii=False)[1:-1])
        self._source.at += 1
        self._write('"')

    def _escaped(self) -> Reading[str]:
        """What stands after a backslash; an escape that Python does not know is two characters."""
        kind = yield from self._source.peek()
        self._source.at += len(kind)
        if kind not in _CODES:
            return _ESCAPES.get(kind, "\\" + kind)
        code = yield from self._code(_CODES[kind])
        if 0xD800 <= code < 0xDC00 and (yield from self._source.some(2)) == "\\u":
            self._source.at += 2
            low = yield from self._code(4)
            if 0xDC00 <= low < 0xE000:
                return chr(0x10000 + ((code - 0xD800) << 10) + low - 0xDC00)
            return "\N{REPLACEMENT CHARACTER}" + _character(low)
        return _character(code)

    def _code(self, digits: int) -> Reading[int]:
        found = yield from self._source.some(digits)
        try:
            code = int(found, 16) if len(found) == digits and found.isalnum() else -1
        except ValueError:
            code = -1
        if not 0 <= code < 0x110000:
            raise MalformedError(f"{found!r} is no code of a character")
        self._source.at += digits
        return code


def json_number(word: str) -> str:
    """A number as JSON writes it.

    Raises:
        MalformedError: it is none, or too large to be one, which some libraries would make ``Infinity``.
    """
    try:
        if (plain := _JSON_NUMBER.fullmatch(word)) and (not any(plain.groups()) or math.isfinite(float(word))):
            return word
        return str(int(word, 0))
    except ValueError:
        pass
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise MalformedError(f"{word[:40]!r} is no value")
    return json.dumps(number)


def _character(code: int) -> str:
    return "\N{REPLACEMENT CHARACTER}" if 0xD800 <= code < 0xE000 else chr(code)
