"""The boxes of an MP4 or QuickTime file: whether all of them are there, and whether what they count is believable.

Of a frame its index may say no more than that there is one: a few bytes that count a hundred million frames would make
FFmpeg fill gigabytes with their places. So whatever stands outside of the frames themselves (``mdat``) is searched for
what counts, wherever it may be hidden, and the numbers are compared with limits before FFmpeg sees them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from ...errors import HerdError

MOST_SAMPLES = 2_000_000
"""Frames and pieces of sound that a file may have: nine hours of either."""

_MOST_BOXES = 100_000
_MOST_INDEX = 64 << 20  # bytes of one box that is not mdat
_MOST_IN_CHUNKS = 32 * MOST_SAMPLES  # where all chunks have as many samples as the largest
_COUNTING = re.compile(b"stsz|stz2|trun|stsc|stco|co64|cmov")
_PLACES = {b"stsz": 12, b"stz2": 12, b"trun": 8, b"stco": 8, b"co64": 8}
"""Where the number stands, from the name of the box on: of samples, of which the first three are, or of chunks."""


def require_boxes(file: BinaryIO, size: int, name: str) -> None:
    """Look through all boxes of a file.

    Raises:
        HerdError: the end is missing, or it counts more than any video has.
    """
    kinds, counted = set(), Counter[str]()
    for number, (kind, start, end) in enumerate(_outermost(file, size)):
        if end > size:
            raise HerdError(f"{name} is cut off: it has {size} of {end} bytes; get it again")
        if number == _MOST_BOXES or (kind != b"mdat" and end - start > _MOST_INDEX) or end - start < 8:
            raise HerdError(f"{name} is a broken video: its boxes are not as an MP4 file has them")
        kinds.add(kind)
        if kind != b"mdat":
            file.seek(start)
            _count(file.read(end - start), counted, name)
    if b"moov" not in kinds:
        raise HerdError(f"{name} is cut off: it has no index (moov), which is written last; get it again")
    if counted["samples"] > MOST_SAMPLES or counted["chunks"] * counted["largest"] > _MOST_IN_CHUNKS:
        raise HerdError(f"{name} counts {counted['samples']} frames and pieces of sound, at most {MOST_SAMPLES} are "
                        "taken: cut it, or leave its sound out")


def _outermost(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each box that is in no other."""
    position = 0
    while size - position >= 8:
        file.seek(position)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:  # does not fit into 32 bits, and follows
            length = int.from_bytes(head[8:16], "big")
        end = position + length if length else size
        yield kind, position, end
        position = end


def _count(box: bytes, counted: Counter[str], name: str) -> None:
    """Add up what a box and those in it count."""
    for found in _COUNTING.finditer(box):
        kind, at = found[0], found.start()
        if kind == b"cmov":
            raise HerdError(f"{name} has a packed index (cmov), which is not read: convert it")
        if kind == b"stsc":
            entries = min(_number(box, at + 8), (len(box) - at - 12) // 12)
            table = np.frombuffer(box, ">u4", max(entries, 0) * 3, at + 12) if entries > 0 else np.zeros(0, ">u4")
            counted["largest"] = max(counted["largest"], int(table[1::3].max(initial=0)))
        else:
            counted["chunks" if kind in (b"stco", b"co64") else "samples"] += _number(box, at + _PLACES[kind])


def _number(box: bytes, at: int) -> int:
    return int.from_bytes(box[at : at + 4], "big")
