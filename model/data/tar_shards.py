"""Samples in a tar file, as WebDataset lays them out: members that share a name up to its first dot belong together.

    cow/0001.jpg  cow/0001.txt        a picture and its text
    cow/0002.0.png  cow/0002.1.png  cow/0002.json        a row (``records``) that may name the pictures "0.png", "1.png"

The file must not be compressed: an index of its members is made once, and any sample is one seek away. The library
``webdataset`` is not used: it reads tar files from front to back only, unpickles members (``.pyd``, ``.pth``), and runs
file names that begin with ``pipe:`` in a shell.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import HerdError
from ..processing.pictures import Source
from .records import PICTURE_EXTENSIONS, Record, parsed, record_of, stored


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
            described = parsed(self._read(group["json"]), origin)
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
        return stored(self._path, member.offset, member.size)


def _members(path: Path) -> list[_Member]:
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            found = [_Member(m.name.removeprefix("./"), m.offset_data, m.size) for m in archive if m.isfile()]
    except (OSError, tarfile.TarError) as error:
        if not size:
            return []
        raise HerdError(f"{path} cannot be read as an uncompressed tar file: {error}") from error
    cut = next((member for member in found if member.offset + member.size > size), None)
    if cut:
        raise HerdError(f"{path} ends inside of its member {cut.name}: get it again")
    return found


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
