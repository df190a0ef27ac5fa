"""Where samples are read from: one index per file, one sample at a time, in any order.

==============================  =====================================================================================
``*.jsonl``                     a row per line (``records``), pictures relative to the file
``*.tar``                       WebDataset: members that share a name up to its first dot are one sample: pictures,
                                ``.txt``, and ``.json`` with a row that may name those pictures
``*.txt``, ``*.md``, no suffix  the whole text is one document, or pages of it (``text_pages``)
a picture or video              a document of that alone
directory of a saved dataset    Hugging Face ``datasets`` (``save_to_disk``); of several splits ``train``
any other directory             its ``*.jsonl`` and ``*.tar`` in order of name, or else its pictures and videos, or
                                else its ``*.txt`` and ``*.md``
==============================  =====================================================================================

Only offsets are held in memory, so a shuffle of everything costs one seek per sample.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from ...errors import HerdError
from ...reading import LINE_BYTES, TEXT_BYTES, open_file, parse_json, read_text
from ..processing.video import load_video
from .heartbeat import Heartbeat
from .records import PICTURE_EXTENSIONS, VIDEO_EXTENSIONS, Part, Picture, Record, frame_parts, record_of, stored
from .tar_shards import TarShard

_TEXT_SUFFIXES = frozenset({".txt", ".md", ""})
_READABLE = "a text, a .jsonl or .tar file, a picture, a video or a directory"


class Samples(Protocol):
    """A sequence of samples that can be read in any order."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Record:
        """One sample, read now.

        Raises:
            HerdError: it is broken; the message names file and line.
        """

    def key(self, index: int) -> str:
        """The name of a sample, without reading its pictures."""


class JsonLines:
    """Rows of a ``.jsonl`` file. A sample without a ``key`` is named by the hash of its line, wherever it stands."""

    def __init__(self, path: Path) -> None:
        self._path = path
        offsets, numbers, position, beat = array("q"), array("q"), 0, Heartbeat(f"reading {path}, line")
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                offsets.append(position)
                numbers.append(number)
            position += len(line)
            beat.tick(number)
        self._offsets, self._numbers = np.array(offsets, np.int64), np.array(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Record:
        line, origin = self._line(index), f"{self._path} line {self._numbers[index]}"
        row = parse_json(line, origin, "each line has to be one JSON object")
        return record_of(row, key=_digest(line), origin=origin, resolve=lambda name: self._path.parent / name)

    def key(self, index: int) -> str:
        """See ``Samples``."""
        line = self._line(index)
        try:
            row = parse_json(line, "")
        except HerdError:  # reading it will tell
            row = None
        return str((isinstance(row, dict) and row.get("key")) or _digest(line))

    def _line(self, index: int) -> bytes:
        return stored(self._path, int(self._offsets[index]))


class TextFile:
    """A plain text, which is one document; an empty file has none. It is named by the hash of its text."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_file(path, most=TEXT_BYTES) as file:
            self._count = int(bool(file.read(1)))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        text = read_text(self._path)
        return Record(_digest(text.encode()), str(self._path), document=(text,))

    def key(self, index: int) -> str:
        """See ``Samples``."""
        return self[index].key


class PictureFiles:
    """Pictures and videos, each a document of its own, named by its file."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        path = self._paths[index]
        parts: Iterable[Part] = frame_parts(load_video(path)) if _is_video(path) else [Picture(path)]
        return Record(path.name, str(path), document=tuple(parts))

    def key(self, index: int) -> str:
        """See ``Samples``."""
        return self._paths[index].name


class SavedDataset:
    """Rows of a Hugging Face dataset that was saved by ``save_to_disk``."""

    def __init__(self, directory: Path) -> None:
        try:
            datasets = import_module("datasets")
        except ImportError as error:
            raise HerdError(f"{directory} is a saved dataset: pip install datasets to read it") from error
        try:
            found = datasets.load_from_disk(str(directory))
        except (OSError, ValueError, KeyError) as error:
            raise HerdError(f"{directory} cannot be read as a dataset: {error}") from error
        if isinstance(found, datasets.DatasetDict):
            if "train" not in found:
                raise HerdError(f"{directory} has splits {', '.join(found)} and no train: give {directory}/SPLIT")
            found = found["train"]
        self._directory, self._rows = directory, found
        self._keys = list(map(str, found["key"])) if "key" in found.column_names else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        origin = f"{self._directory} row {index}"
        try:
            row = self._rows[index]
        except Exception as error:  # pictures are decoded here, by whatever library
            raise HerdError(f"{origin} cannot be read: {error}") from error
        return record_of(row, key=self.key(index), origin=origin, resolve=lambda name: self._directory / name)

    def key(self, index: int) -> str:
        """See ``Samples``."""
        return self._keys[index] if self._keys else f"{self._directory.name}:{index}"


class Joined:
    """Several sources, one behind the other."""

    def __init__(self, sources: Sequence[Samples]) -> None:
        self._sources = list(sources)
        self._ends = list(accumulate(map(len, self._sources)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        source, local = self._find(index)
        return source[local]

    def key(self, index: int) -> str:
        """See ``Samples``."""
        source, local = self._find(index)
        return source.key(local)

    def _find(self, index: int) -> tuple[Samples, int]:
        number = bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)


def open_samples(paths: Iterable[Path], open_text: Callable[[Path], Samples] = TextFile) -> Samples:
    """All samples of files and directories.

    Args:
        paths: as in the table above.
        open_text: what a plain text is read as: one document, or pages (``text_pages``).

    Raises:
        HerdError: nothing there, a file of an unknown kind, or one without samples.
    """
    sources = [source for path in paths for source in _open(Path(path), open_text)]
    if not sources:
        raise HerdError(f"there is no data: give {_READABLE}")
    return sources[0] if len(sources) == 1 else Joined(sources)


def _open(path: Path, open_text: Callable[[Path], Samples]) -> list[Samples]:
    suffix = path.suffix.lower()
    try:
        if not path.exists():
            raise HerdError(f"{path} does not exist: give {_READABLE}")
    except ValueError as error:
        raise HerdError(f"{str(path)!r} is no name of a file: give {_READABLE}") from error
    if path.is_dir():
        return _open_directory(path, open_text)
    if not path.is_file():  # a pipe or a device may never end
        raise HerdError(f"{path} is not a regular file: give {_READABLE}")
    if suffix == ".jsonl":
        return [_with_samples(JsonLines(path), path)]
    if suffix == ".tar":
        return [_with_samples(TarShard(path), path)]
    if suffix in _TEXT_SUFFIXES:
        return [_with_samples(open_text(path), path)]
    if _is_picture(path) or _is_video(path):
        return [PictureFiles([path])]
    raise HerdError(f"{path} is a {path.suffix} file: .txt, .jsonl, uncompressed .tar, pictures, videos and "
                    "directories are read")


def _open_directory(directory: Path, open_text: Callable[[Path], Samples]) -> list[Samples]:
    if any((directory / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return [_with_samples(SavedDataset(directory), directory)]
    try:
        children = sorted(directory.iterdir())
    except OSError as error:
        raise HerdError(f"{directory} cannot be read: {error.strerror}") from error
    if shards := [child for child in children if child.suffix.lower() in (".jsonl", ".tar")]:
        return [source for shard in shards for source in _open(shard, open_text)]
    if pictures := [child for child in children if _is_picture(child) or _is_video(child)]:
        return [PictureFiles(pictures)]
    if texts := [child for child in children if child.suffix.lower() in (".txt", ".md")]:
        return [source for text in texts for source in _open(text, open_text)]
    raise HerdError(f"{directory} holds no .jsonl, .tar or .txt files, no pictures and no saved dataset: give another "
                    "directory")


def _is_picture(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in PICTURE_EXTENSIONS


def _is_video(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in VIDEO_EXTENSIONS


def _with_samples(source: Samples, path: Path) -> Samples:
    if not len(source):
        raise HerdError(f"{path} is empty: it holds no samples")
    return source


def _lines(path: Path) -> Iterator[bytes]:
    with open_file(path) as file:
        try:
            number = 0
            while line := file.readline(LINE_BYTES + 1):
                number += 1
                if len(line) > LINE_BYTES:
                    raise HerdError(f"{path} line {number} has more than {LINE_BYTES} bytes: split it into several")
                yield line
        except OSError as error:
            raise HerdError(f"{path} cannot be read: {error.strerror}") from error


def _digest(line: bytes) -> str:
    return hashlib.sha256(line.strip()).hexdigest()[:16]
