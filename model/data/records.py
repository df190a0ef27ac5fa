"""Samples as they stand in a file: documents and conversations of interleaved text, pictures and videos.

A row is an object with one of

=================================================  ================================================================
``{"text": "A <|image|> cow", "images": [...]}``   a document; pictures without a placeholder stand in front
``{"content": ["A", {"image": "cow.png"}, ...]}``  a document of parts, in order
``{"messages": [{"role": ..., "content": ...}]}``  a conversation; contents are a text or parts; ``tools`` beside it
=================================================  ================================================================

and, if it likes, a ``key`` that names the sample. A part is a text, ``{"text": ...}``, ``{"image": ...}`` or
``{"video": ...}``, with or without a ``type``. A ``{"type": "image"}`` without a picture takes the next of ``images``.

A video is a file or a list of frames, and becomes what it does in a prompt: frames, each a picture of a single tile
behind its time (``processing/frames``). ``fps``, ``max_frames`` and ``sampling`` stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import HerdError
from ...reading import LINE_BYTES, open_file
from ..processing.frames import Frame, FrameSampling, frames_at
from ..processing.pictures import Source
from ..processing.video import load_video

IMAGE = "<|image|>"
PICTURE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "gif"})
VIDEO_EXTENSIONS = frozenset({"mp4", "m4v", "mov", "webm", "mkv"})

Resolve = Callable[[str], Source]
"""From the name of a picture or video in a row to something that can be read."""


@dataclass(frozen=True)
class Picture:
    """A picture, or a frame of a video."""

    source: Source | Frame


Part = str | Picture


@dataclass(frozen=True)
class Turn:
    """One message: who speaks, what, and whatever else the chat template may want to know."""

    role: Any
    parts: tuple[Part, ...]
    extra: Mapping[str, Any]

    def message(self) -> dict[str, Any]:
        """The message as chat templates expect it: every part says whether it is a text or an image."""
        content = [
            {"type": "image", "image": part.source} if isinstance(part, Picture) else {"type": "text", "text": part}
            for part in self.parts
        ]
        return {**self.extra, "role": self.role, "content": content}


@dataclass(frozen=True)
class Record:
    """One sample.

    Attributes:
        key: names it; the held-out split hashes it.
        origin: file and line, for messages.
        document: parts of a document, empty for a conversation.
        turns: of a conversation, empty for a document.
        tools: descriptions of tools that a conversation may use.
    """

    key: str
    origin: str
    document: tuple[Part, ...] = ()
    turns: tuple[Turn, ...] = ()
    tools: tuple[Any, ...] = ()

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, in the order in which they are seen."""
        parts = [part for turn in self.turns for part in turn.parts]
        return [part for part in (*self.document, *parts) if isinstance(part, Picture)]

    @property
    def is_plain_text(self) -> bool:
        """Whether it is a document without pictures."""
        return all(isinstance(part, str) for part in self.document) and not self.turns

    def completion(self) -> str:
        """The text of a document, with a placeholder for every picture."""
        return "".join(part if isinstance(part, str) else IMAGE for part in self.document)


def record_of(row: Any, *, key: str, origin: str, resolve: Resolve) -> Record:
    """The sample in a row.

    Args:
        row: as in the table above.
        key: used when the row has none.
        origin: file and line.
        resolve: how to get pictures that are given by name.

    Raises:
        HerdError: a field is missing, of the wrong kind, or pictures and their places do not match.
    """
    if not isinstance(row, Mapping):
        raise HerdError(f"{origin} is a {type(row).__name__}: a sample is an object with text, content or messages")
    reader = _Reader(origin, resolve)
    pictures = [reader.picture(value) for value in _listed(row, origin)]
    waiting, key = iter(pictures), str(row.get("key") or key)
    if row.get("messages") is not None:
        tools = row.get("tools") or []
        if not isinstance(tools, list | tuple):
            raise HerdError(f"{origin}: tools is of type {type(tools).__name__}, a list is needed")
        record = Record(key, origin, turns=tuple(reader.turns(row["messages"], waiting)), tools=tuple(tools))
    elif row.get("content") is not None:
        record = Record(key, origin, document=tuple(reader.parts(row["content"], waiting)))
    else:
        record = Record(key, origin, document=tuple(_split(row.get("text"), pictures, waiting, origin)))
    if left := len(list(waiting)):
        raise HerdError(f"{origin} has {len(pictures)} images for {len(pictures) - left} places: they must match")
    return record


def _listed(row: Mapping[str, Any], origin: str) -> list[Any]:
    images = row.get("images")
    if images is None:
        return [row["image"]] if row.get("image") is not None else []
    if not isinstance(images, list | tuple):
        raise HerdError(f"{origin}: images is of type {type(images).__name__}, a list is needed")
    return list(images)


def _split(text: Any, pictures: list[Picture], waiting: Iterator[Picture], origin: str) -> Iterator[Part]:
    """A text with a picture for every placeholder."""
    if text is not None and not isinstance(text, str):
        raise HerdError(f"{origin}: text is of type {type(text).__name__}, a string is needed")
    if not text and not pictures:
        raise HerdError(f"{origin} has neither text, content, messages nor images")
    pieces = (text or "").split(IMAGE)
    places = len(pieces) - 1
    missing = len(pictures) - places
    if missing < 0:
        raise HerdError(f"{origin} has {places} image placeholders and {len(pictures)} images: they must match")
    yield from (next(waiting) for _ in range(missing))
    for index, piece in enumerate(pieces):
        if index:
            yield next(waiting)
        if piece:
            yield piece


def stored(path: Path, offset: int, size: int | None = None) -> bytes:
    """Some bytes of a file, or the rest of a line.

    Raises:
        HerdError: the file is gone or cannot be read.
    """
    with open_file(path) as file:
        try:
            file.seek(offset)
            return file.readline(LINE_BYTES) if size is None else file.read(size)
        except OSError as error:
            raise HerdError(f"{path} cannot be read: {error.strerror}") from error


def frame_parts(frames: Iterable[Frame]) -> Iterator[Part]:
    """Frames of a video, each behind its time."""
    for frame in frames:
        yield frame.stamp
        yield Picture(frame)


@dataclass(frozen=True)
class _Reader:
    """Parts of one row."""

    origin: str
    resolve: Resolve

    def turns(self, messages: Any, waiting: Iterator[Picture]) -> Iterator[Turn]:
        if not isinstance(messages, list | tuple) or not messages:
            raise HerdError(f"{self.origin}: messages is not a list of messages")
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or message.get("content") is None or "role" not in message:
                raise HerdError(f"{self.origin}: message {number} is no object with role and content")
            extra = {name: value for name, value in message.items() if name not in ("role", "content")}
            yield Turn(message["role"], tuple(self.parts(message["content"], waiting)), extra)

    def parts(self, content: Any, waiting: Iterator[Picture]) -> Iterator[Part]:
        if not isinstance(content, str | list | tuple):
            raise HerdError(f"{self.origin}: content is of type {type(content).__name__}, a text or a list is needed")
        for part in [content] if isinstance(content, str) else content:
            yield from self.part(part, waiting)

    def part(self, part: Any, waiting: Iterator[Picture]) -> Iterator[Part]:
        if isinstance(part, str):
            yield part
        elif not isinstance(part, Mapping):
            raise HerdError(f"{self.origin}: a part is of type {type(part).__name__}, a text or an object is needed")
        elif isinstance(part.get("text"), str):
            yield part["text"]
        elif part.get("type") == "video" or part.get("video") is not None:
            yield from self.video(part)
        else:
            yield self.place(part, waiting)

    def place(self, part: Mapping[str, Any], waiting: Iterator[Picture]) -> Picture:
        own = next((part[name] for name in ("image", "path", "data") if part.get(name) is not None), None)
        if own is not None:
            return self.picture(own)
        if part.get("type") != "image":
            raise HerdError(f"{self.origin}: a part has fields {sorted(part)}, text, image or video is needed")
        following = next(waiting, None)
        if following is None:
            raise HerdError(f"{self.origin}: there are more parts of type image than images: they must match")
        return following

    def video(self, part: Mapping[str, Any]) -> Iterator[Part]:
        given = next((part[name] for name in ("video", "path", "data") if part.get(name) is not None), None)
        try:
            sampling = FrameSampling.of(part)
            if isinstance(given, list | tuple):
                frames = frames_at([self.source(frame, "picture") for frame in given], sampling.fps)
            else:
                frames = load_video(self.source(given, "video"), sampling)
        except HerdError as error:
            raise error if str(error).startswith(self.origin) else HerdError(f"{self.origin}: {error}") from error
        yield from frame_parts(frames)

    def picture(self, value: Any) -> Picture:
        return Picture(self.source(value, "picture"))

    def source(self, value: Any, what: str) -> Any:
        """A picture or video given by name, as bytes or as a Pillow image; some datasets wrap bytes or a path."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value:
            value = self.resolve(self.name(value, what))
        if not isinstance(value, bytes | Path | Image.Image):
            raise HerdError(f"{self.origin}: a {what} is of type {type(value).__name__}, a path is needed")
        return value

    def name(self, name: str, what: str) -> str:
        """The name of a picture or video, as a file may be called."""
        try:
            unfit = "\0" in name or not name.encode()
        except UnicodeEncodeError:  # half a character, which JSON can write
            unfit = True
        if unfit:
            raise HerdError(f"{self.origin}: the {what}'s name {name!r} is no name of a file: correct it")
        return name
