"""What kind of video a file is, and whether all of it is there: looked at before a decoder is.

Kinds are told by their first bytes, never guessed by FFmpeg: it would try hundreds of formats, playlists among them.
MP4 is boxes (``boxes``), WebM one large element, each with its size in front. Where a size leads behind the end of the
file, a part is missing.
"""

from __future__ import annotations

import os
from typing import BinaryIO, Literal

from ...errors import HerdError
from .boxes import require_boxes

Kind = Literal["mov", "matroska", "animation"]
"""As FFmpeg calls it, or what Pillow reads."""

_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")  # with which MP4 and QuickTime begin
_EBML, _SEGMENT = bytes.fromhex("1a45dfa3"), bytes.fromhex("18538067")
_READABLE = "MP4, WebM, animated WebP or GIF"


def kind_of(file: BinaryIO, name: str) -> Kind:
    """The kind of a video.

    Raises:
        HerdError: it is none that is read, or its end is missing.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(16)
    if start[:4] == b"GIF8" or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
        return "animation"
    if start[4:8] in _BOXES:
        require_boxes(file, size, name)
        return "mov"
    if start[:4] == _EBML:
        _require_segment(file, size, name)
        return "matroska"
    raise HerdError(f"{name} is not a video that is read here: {_READABLE}")


def _require_segment(file: BinaryIO, size: int, name: str) -> None:
    file.seek(4)
    header, _ = _vint(file)
    file.seek(header, os.SEEK_CUR)
    if file.read(4) != _SEGMENT:
        raise HerdError(f"{name} is a broken WebM: there is no segment behind its head; get it again")
    length, unknown = _vint(file)
    if not unknown and (end := file.tell() + length) > size:
        raise HerdError(f"{name} is cut off: it has {size} of {end} bytes; get it again")


def _vint(file: BinaryIO) -> tuple[int, bool]:
    """A size in as many bytes as its first one has leading zeros; all ones is a size that nobody knew."""
    first = (file.read(1) or b"\0")[0]
    more = 8 - first.bit_length()
    bits = 7 * (more + 1)
    value = int.from_bytes(bytes([first]) + file.read(more), "big") & ((1 << bits) - 1)
    return value, value == (1 << bits) - 1
