"""A plain text in pages, each a sample: a model learns all of a book, not just as much as fits into one row."""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path

from ...errors import HerdError
from ...reading import open_file
from .heartbeat import Heartbeat
from .records import Record, stored


class TextPages:
    """A text file of any size, cut behind blanks into pages. A page is named by the hash of its text.

    Args:
        path: of the text.
        size: bytes of a page, at most.

    Raises:
        HerdError: it is no regular file, or cannot be read.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path, beat = path, Heartbeat(f"reading {path}, page")
        self._ends = array("q", [0])
        with open_file(path) as file:
            try:
                while block := file.read(size):
                    self._ends.append(self._ends[-1] + _whole(block, size))
                    file.seek(self._ends[-1])
                    beat.tick(len(self))
            except OSError as error:
                raise HerdError(f"{path} cannot be read: {error.strerror}") from error

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


def _whole(block: bytes, size: int) -> int:
    """How much of a block is a page: up to its last line or word, or at least its last whole character."""
    if len(block) < size:
        return len(block)
    found = block.rfind(b"\n", size // 2) + 1 or block.rfind(b" ", size // 2) + 1
    if found:
        return found
    start = len(block)
    while start > max(1, len(block) - 4) and block[start - 1] & 0xC0 == 0x80:
        start -= 1
    return start - 1 if start > 1 and block[start - 1] >= 0xC0 else len(block)
