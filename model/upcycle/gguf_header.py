"""The head of a GGUF file, walked once before the ``gguf`` library reads it.

The library trusts every count: an array of 2^60 numbers in a file of a kilobyte is a loop without end. Here each count
is compared with what is left of the file. Format: magic, version, counts of tensors and of key-value pairs, the pairs,
then name, shape, type and place of each tensor (ggml's ``docs/gguf.md``).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...errors import HerdError
from ...reading import TEXT_BYTES, open_file, require_within

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each type of number."""
_STRING, _ARRAY = 8, 9
_MOST_PAIRS, _MOST_TENSORS, _MOST_AXES = 10_000, 1_000_000, 4
MOST_ENTRIES = 1 << 22
"""Most entries of all arrays together; vocabulary, types and merges of a large tokenizer have a million."""
_MOST_ELEMENTS = 1 << 40


def check_header(path: Path) -> None:
    """Walk the head of a file.

    Raises:
        HerdError: not a GGUF file, cut off, or with a count that cannot be.
    """
    with open_file(path) as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise HerdError(f"{path} is not a GGUF file: it starts with {magic!r}, GGUF is needed")
        _Walk(path, file, ">" if file.read(4)[:2] == b"\0\0" else "<").run()


@dataclass
class _Walk:
    path: Path
    file: BinaryIO
    order: str
    entries: int = 0

    def run(self) -> None:
        tensors = require_within(f"the number of tensors of {self.path}", self._number(8), _MOST_TENSORS)
        pairs = require_within(f"the number of metadata pairs of {self.path}", self._number(8), _MOST_PAIRS)
        for _ in range(pairs):
            self._string()
            self._value(self._number(4))
        for _ in range(tensors):
            self._tensor()

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            self._array()
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise HerdError(f"{self.path} is damaged: its metadata has a value of the type {kind}; get it again")

    def _array(self) -> None:
        kind, count = self._number(4), self._number(8)
        self.entries += require_within(f"the entries of an array of {self.path}", count, MOST_ENTRIES - self.entries)
        if kind in _SIZES:
            self._skip(count * _SIZES[kind])
        elif kind == _STRING:
            for _ in range(count):
                self._string()
        else:
            raise HerdError(f"{self.path} is damaged: its metadata has an array of the type {kind}; get it again")

    def _tensor(self) -> None:
        self._string()
        axes = require_within(f"the number of axes of a tensor of {self.path}", self._number(4), _MOST_AXES)
        elements = 1
        for _ in range(axes):
            elements *= self._number(8)
        require_within(f"the size of a tensor of {self.path}", elements if axes else -1, _MOST_ELEMENTS)
        self._skip(4 + 8)

    def _string(self) -> None:
        self._skip(require_within(f"the length of a text of {self.path}", self._number(8), TEXT_BYTES))

    def _number(self, size: int) -> int:
        found: int = struct.unpack(self.order + {4: "I", 8: "Q"}[size], self._skip(size))[0]
        return found

    def _skip(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise HerdError(f"{self.path} cannot be read as GGUF, it is damaged or cut off: get it again")
        return data
