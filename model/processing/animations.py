"""Animated GIF and WebP to frames, by Pillow, within the bounds of pictures.

Neither format says how long it is: the frames are gone through once for their times, and once more for those that are
looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

from PIL import Image, ImageFile

from .frames import Frame, FrameSampling, reduced
from .pictures import decoding, pillow_as_it_comes, require_memory, rgb

_FORMATS = ("GIF", "WEBP")
_UNTOLD = 0.1  # seconds of a frame that says nothing or almost nothing of its time, as in browsers


def read_animation(file: BinaryIO, name: str, sampling: FrameSampling, check: Callable[[float], None]) -> list[Frame]:
    """Frames of an animation.

    Args:
        file: that has it.
        name: of the file, for messages.
        sampling: which frames.
        check: is called with the seconds that were looked at so far, again and again, to end what takes too long.

    Raises:
        HerdError: it is broken, too large, or ``check`` ends it.
    """
    with pillow_as_it_comes(), decoding(name), Image.open(file, formats=_FORMATS) as image:
        require_memory(image, name)
        starts, end = _times(image, check)
        frames = []
        for number in sampling.choose(starts, end, range(len(starts))):
            check(end)
            image.seek(number)
            frames.append(Frame(starts[number], reduced(rgb(image, 1))))
        return frames


def _times(image: ImageFile.ImageFile, check: Callable[[float], None]) -> tuple[list[float], float]:
    """When each frame is first seen, and when the last one goes."""
    starts, now, count = [], 0.0, getattr(image, "n_frames", 1)
    for number in range(count):
        check(now)
        image.seek(number)
        image.load()  # WebP tells the time of what was decoded
        starts.append(now)
        told = float(image.info.get("duration", 0)) / 1000
        now += told if told > 0.01 else _UNTOLD
    return starts, now
