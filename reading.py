"""Reading what others wrote, within bounds: every reader of the package opens files and parses JSON through here.

* Only regular files are opened: a pipe or a device may never end. Links are followed, because caches of checkpoints
  are made of them; a bundle refuses links that lead out of it (``runtimes.bundle``).
* A file is read whole only up to a size that its kind never exceeds.
* A number that decides how much is allocated is compared with a limit before it is used.
* JSON has no duplicate keys, for two readers would see two different files; no NaN, and no number of endless digits.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from .errors import HerdError

JSON_BYTES = 64 << 20
"""Largest JSON file; the largest real ones, indices and tokenizers of the released models, have 30 MB."""
LINE_BYTES = 16 << 20
"""Largest line of a ``.jsonl`` file: a document of a few million words."""
TEXT_BYTES = 256 << 20
"""Largest plain text that is read whole."""
_HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""How halves of characters outside of the first 65,536 are written; a pair of them is one character."""
_DIGITS = 18
"""Digits of the largest whole number, just below 2^63."""


def open_file(path: Path, *, most: int | None = None) -> BinaryIO:
    """Open a regular file for reading, unbuffered decisions about its kind made on what was really opened.

    Args:
        path: links are followed.
        most: bytes that it may have, None for any.

    Raises:
        HerdError: it is not there, cannot be read, is no regular file, or is larger.
    """
    try:
        # Without O_NONBLOCK opening a pipe waits for somebody who writes to it.
        file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    except IsADirectoryError as error:
        raise HerdError(f"{path} is a directory, a file is needed") from error
    except OSError as error:
        raise HerdError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name, or half a character
        raise HerdError(f"{str(path)!r} is no name of a file: {error}") from error
    found = os.fstat(file.fileno())
    problem = ""
    if not stat.S_ISREG(found.st_mode):
        problem = "is not a regular file: give a file, no pipe, device or directory"
    elif most is not None and found.st_size > most:
        problem = f"has {found.st_size} bytes, at most {most} are read: is it the right file?"
    if problem:
        file.close()
        raise HerdError(f"{path} {problem}")
    return file


def read_bytes(path: Path, *, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        HerdError: see ``open_file``.
    """
    with open_file(path, most=most) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise HerdError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > most:  # it grew, or its size was a lie, as in /proc
        raise HerdError(f"{path} has more than {most} bytes, which is the most that is read: is it the right file?")
    return content


def read_text(path: Path, *, most: int = TEXT_BYTES) -> str:
    """A UTF-8 text file.

    Raises:
        HerdError: see ``open_file``; or it is not UTF-8.
    """
    try:
        return read_bytes(path, most=most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise HerdError(f"{path} cannot be read as UTF-8 text (byte {error.start}): get it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        HerdError: no file, not JSON, or not an object.
    """
    content = parse_json(read_text(path, most=JSON_BYTES), f"{path}", "get or write it again")
    if not isinstance(content, dict):
        raise HerdError(f"{path} holds a {type(content).__name__}, a JSON object is needed: get or write it again")
    return content


def read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, an empty one when there is nothing of that name.

    Raises:
        HerdError: not JSON, or not an object.
    """
    return read_json(path) if path.exists() else {}


def parse_json(text: str | bytes, origin: str, advice: str = "correct it") -> Any:
    """Parse JSON from strangers.

    Args:
        text: bounded already.
        origin: what it is, for the message.
        advice: what to do when it is broken, for the message.

    Raises:
        HerdError: not JSON, nested too deeply, a key given twice, NaN or infinity, or half a character.
    """
    try:
        content = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_int=_integer)
        if _HALF.search(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")):
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except UnicodeEncodeError as error:
        raise HerdError(f"{origin} cannot be read as JSON: a text in it has half a character; {advice}") from error
    except RecursionError as error:
        raise HerdError(f"{origin} cannot be read as JSON, it is nested too deeply: {advice}") from error
    except ValueError as error:
        raise HerdError(f"{origin} cannot be read as JSON: {error}; {advice}") from error


def require_within(what: str, count: int, most: int) -> int:
    """A number that decides how much is allocated or how often something is done, from 0 on.

    Raises:
        HerdError: it is negative or above ``most``.
    """
    if not 0 <= count <= most:
        raise HerdError(f"{what} is {count}, it must be within 0 and {most}")
    return count


@contextmanager
def panics_refused(what: str) -> Iterator[None]:
    """A panic inside a Rust library is an error like any other: it derives from ``BaseException`` and would pass
    every ``except Exception`` of a server.

    Rust's own report of the panic stands on standard error before our line, and stays there. It is written by the
    library's panic hook, which Python cannot replace, straight to file descriptor 2. Redirecting that for the duration
    would take the messages of all other threads along, and processes started meanwhile would inherit it; a pattern
    cannot be judged beforehand, because whether it runs out of retries depends on the text; and a process of its own
    for every text would cost more than reading it. ``RUST_BACKTRACE=0`` keeps the report to its first lines.

    Args:
        what: was being done, for the message.

    Raises:
        HerdError: the library panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise HerdError(f"{what} failed inside of a library: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} is given twice")
        found[name] = value
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _integer(text: str) -> int | float:
    """Longer numbers are read as floating point, as JavaScript does, and fail where a whole number is needed."""
    return int(text) if len(text) <= _DIGITS else float(text)
