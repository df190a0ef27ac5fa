"""Samples in a tar file, as WebDataset lays them out: members that share a name up to its first dot belong together.

    cow/0001.jpg  cow/0001.txt        a picture and its text
    cow/0002.0.png  cow/0002.1.png  cow/0002.json        a row (``records``) that may name the pictures "0.png", "1.png"
    cow/0003.mp4  cow/0003.json                          a row that names the video "mp4"

The file must not be compressed: an index of its members is made once, and any sample is one seek away. The library
``webdataset`` is not used: it reads tar files from front to back only, unpickles members (``.pyd``, ``.pth``), and runs
file names that begin with ``pipe:`` in a shell.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from ...errors import HerdError
from ...reading import LINE_BYTES, open_file, parse_json, require_within
from ..processing.pictures import MAX_BYTES, Source
from .records import PICTURE_EXTENSIONS, VIDEO_EXTENSIONS, Record, record_of, stored

_MEMBERS = 1_000_000
"""Most members of a shard, whose names are held in memory; usual ones have some ten thousand."""


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


class TarShard:
    """Samples of one shard."""

    def __init__(self, path: Path) -> None:
        self._path = path
        groups: dict[str, dict[str, _Member]] = {}
        for member in _members(path):
            folder, _, file = member.name.rpartition("/")
            stem, _, extension = file.partition(".")
            groups.setdefault(f"{folder}/{stem}".strip("/"), {})[extension.lower()] = member
        self._keys, self._groups = list(groups), list(groups.values())

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Record:
        key, group = self._keys[index], self._groups[index]
        origin = f"{self._path} sample {key}"
        pictures = [name for name in group if name.rpartition(".")[2] in PICTURE_EXTENSIONS]
        row: dict[str, Any] = {}
        if "txt" in group:
            row["text"] = _text(self._read(group["txt"]), origin)
        if "json" in group:
            described = parse_json(self._read(group["json"]), origin, "get it again")
            row |= described if isinstance(described, dict) else {"content": described}
        if not _names_pictures(row):
            row["images"] = pictures

        def resolve(name: str) -> Source:
            found = group.get(name.lower()) or next((m for m in group.values() if m.name == name), None)
            if found is None:
                raise HerdError(f"{origin} names the picture {name}, it has {', '.join(pictures) or 'none'}")
            return self._read(found)

        return record_of(row, key=key, origin=origin, resolve=resolve)

    def key(self, index: int) -> str:
        """See ``Samples``."""
        return self._keys[index]

    def _read(self, member: _Member) -> bytes:
        large = member.name.rpartition(".")[2].lower() in PICTURE_EXTENSIONS | VIDEO_EXTENSIONS
        most = MAX_BYTES if large else LINE_BYTES
        require_within(f"{self._path} member {member.name}: its size in bytes", member.size, most)
        return stored(self._path, member.offset, member.size)


class _Headers:
    """A tar file of which headers are read only: their size, too, is what a stranger wrote."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        return self._read(require_within("the size of a header in bytes", size, LINE_BYTES))


def _members(path: Path) -> list[_Member]:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            return list(_indexed(file, size)) if size else []
        except (HerdError, OSError, tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            raise HerdError(f"{path} cannot be read as an uncompressed tar file: {error}; get it again") from error


def _indexed(file: BinaryIO, size: int) -> Iterator[_Member]:
    """The files of an archive, each one behind the one before it: a size may be negative, or lead back."""
    end = 0
    with cast("Any", tarfile.open(fileobj=cast("Any", _Headers(file)), mode="r:")) as archive:
        for _ in range(_MEMBERS + 1):
            if (found := archive.next()) is None:
                return
            archive.members.clear()  # it would keep all of them
            taken = found.size if found.isfile() else 0
            if found.offset < end or not 0 <= taken <= size - found.offset_data or found.issparse():
                raise HerdError(f"its member {found.name!r} has {found.size} bytes, which are not there")
            end = found.offset_data + taken
            if found.isfile():
                yield _Member(found.name.removeprefix("./"), found.offset_data, found.size)
    raise HerdError(f"it has more than {_MEMBERS} members, split it into several shards")


def _names_pictures(row: dict[str, Any]) -> bool:
    """Whether a row of a tar file says itself which pictures go where."""
    if row.get("images") is not None or row.get("image") is not None:
        return True
    messages = row["messages"] if isinstance(row.get("messages"), list) else []
    contents = [row.get("content"), *(message.get("content") for message in messages if isinstance(message, dict))]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(part.get(name) is not None for part in parts for name in ("image", "path", "data", "video"))


def _text(data: bytes, origin: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HerdError(f"{origin} has a text that is not UTF-8: {error.reason}") from error
