"""Videos from strangers to some of their frames, in bounded time and memory.

MP4 and WebM are read by PyAV (``films``), animated WebP and GIF by Pillow (``animations``).
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import HerdError
from ...reading import open_file
from .animations import read_animation
from .containers import kind_of
from .films import read_film
from .frames import Frame, FrameSampling, frames_at
from .pictures import MAX_BYTES

MOST_SECONDS = 4 * 3600
"""How long a video may be."""
MOST_WORK = 30.0
"""Seconds of processor time that reading a video may take."""

VideoSource = str | Path | bytes | bytearray | memoryview | Sequence[Any]
"""A path, the bytes of a file, or frames: pictures, or ``Frame`` with times of their own."""


def load_video(source: VideoSource, sampling: FrameSampling | None = None) -> list[Frame]:
    """Some frames of a video.

    Args:
        source: a path, the bytes of a file, or a list of frames. Pictures in a list are all taken, ``fps`` to the
            second; those that are ``Frame`` already stay as they are.
        sampling: which frames of a file, None for the default.

    Raises:
        HerdError: no such file, not a video, broken or cut off, without frames, another codec, too large or too long,
            or PyAV is missing.
    """
    sampling = sampling or FrameSampling()
    if isinstance(source, (list, tuple)):
        given = [frame for frame in source if isinstance(frame, Frame)]
        return given if given and len(given) == len(source) else frames_at(source, sampling.fps)
    name = "the video data" if isinstance(source, (bytes, bytearray, memoryview)) else str(source)
    with _opened(source) as file:
        try:
            kind, check = kind_of(file, name), _limit(name)
        except OSError as error:
            raise HerdError(f"{name} cannot be read: {error.strerror}") from error
        if kind == "animation":
            return read_animation(file, name, sampling, check)
        return read_film(file, kind, name, sampling, check)


def showing_frames(message: Mapping[str, Any]) -> dict[str, Any]:
    """A checked message whose videos are frames: for each a text with its time, and a picture.

    Raises:
        HerdError: see ``load_video``.
    """
    if isinstance(message["content"], str):
        return dict(message)
    parts: list[dict[str, Any]] = []
    for part in message["content"]:
        parts += _frame_parts(part) if part["type"] == "video" else [part]
    return {**message, "content": parts}


def _frame_parts(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    frames = load_video(part["source"], part["sampling"])
    pairs = [({"type": "text", "text": frame.stamp}, {"type": "image", "source": frame}) for frame in frames]
    return [half for pair in pairs for half in pair]


def _opened(source: Any) -> AbstractContextManager[BinaryIO]:
    if isinstance(source, (str, Path)):
        return open_file(Path(source), most=MAX_BYTES)
    if not isinstance(source, (bytes, bytearray, memoryview)):
        raise HerdError(f"a video was given as {type(source).__name__}: give a path, the bytes of a file, or a list of "
                        "frames")
    if (size := memoryview(source).nbytes) > MAX_BYTES:
        raise HerdError(f"the video data has {size} bytes, at most {MAX_BYTES} are read: make it smaller")
    return io.BytesIO(source)


def _limit(name: str) -> Callable[[float], None]:
    """What ends a video that is too long, or takes too long."""
    ends = time.thread_time() + MOST_WORK

    def check(seconds: float) -> None:
        if seconds > MOST_SECONDS:
            raise HerdError(f"{name} is longer than {MOST_SECONDS} seconds: cut it")
        if time.thread_time() > ends:
            raise HerdError(f"{name} takes more than {MOST_WORK:g} seconds to decode: cut it, make it smaller, or take "
                            "its keyframes (sampling)")

    return check
