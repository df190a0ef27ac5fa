"""A plain text in pages, each a sample: a model learns all of a book, not just as much as fits into one row."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import HerdError
from ...reading import open_file
from .heartbeat import Heartbeat
from .records import Record, stored

_CHARACTER = 4
"""Bytes of a character, at most."""


class TextPages:
    """A text file of any size in pages of whole lines, as many as fit. A page is named by the hash of its text.

    A line that may not fit into a page of its own is cut behind blanks. Lines are counted one by one: that takes a
    second for two megabytes, and byte-pair encoding makes no more tokens of a page than of its lines.

    Args:
        path: of the text.
        count: tokens of a text, at most one for each of its bytes.
        room: tokens of a page, at most.

    Raises:
        HerdError: it is no regular file, or cannot be read.
    """

    def __init__(self, path: Path, count: Callable[[str], int], room: int) -> None:
        self._path, beat = path, Heartbeat(f"reading {path}, page")
        self._ends, end, free = array("q", [0]), 0, room
        for piece in _pieces(path, max(room, _CHARACTER)):
            needed = count(piece.decode(errors="replace"))
            if needed > free and end > self._ends[-1]:
                self._ends.append(end)
                free = room
                beat.tick(len(self))
            end, free = end + len(piece), free - needed
        if end:
            self._ends.append(end)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Record:
        page, origin = self._page(index), f"{self._path} byte {self._ends[index]}"
        try:
            return Record(self.key(index), origin, document=(page.decode(),))
        except UnicodeDecodeError as error:
            raise HerdError(f"{self._path} cannot be read as UTF-8 text (byte {self._ends[index] + error.start}): get "
                            "it again") from error

    def key(self, index: int) -> str:
        """See ``Samples``."""
        return hashlib.sha256(self._page(index).strip()).hexdigest()[:16]

    def _page(self, index: int) -> bytes:
        return stored(self._path, self._ends[index], self._ends[index + 1] - self._ends[index])


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    """The lines of a text, those longer than ``size`` bytes in several pieces."""
    with open_file(path) as file:
        try:
            start = 0
            while block := file.readline(size):
                piece = block[: _whole(block, size)]
                start += len(piece)
                if len(piece) < len(block):
                    file.seek(start)
                yield piece
        except OSError as error:
            raise HerdError(f"{path} cannot be read: {error.strerror}") from error


def _whole(block: bytes, size: int) -> int:
    """How much of a block is a piece: a line, or up to the last word, or at least up to the last whole character."""
    if len(block) < size or block.endswith(b"\n"):
        return len(block)
    if found := block.rfind(b" ", size // 2) + 1:
        return found
    start = len(block)
    while start > max(1, len(block) - 4) and block[start - 1] & 0xC0 == 0x80:
        start -= 1
    return start - 1 if start > 1 and block[start - 1] >= 0xC0 else len(block)
