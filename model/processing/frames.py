"""Frames of videos: pictures with a time, and which of a video's frames are looked at.

A frame stands in the text as its time in plain words and the picture behind it, ``Time: 0.5s<|image|>``, and never has
more than one tile. The released models were shown videos that way if at all: their vocabulary has no tokens for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from ...errors import HerdError, shown
from .pictures import Source

MOST_FRAMES = 256
"""Frames of a video that are looked at."""
FRAME_SIDE = 672
"""Pixels along the longer side to which larger frames are reduced: twice the only tile of the released models."""

Strategy = Literal["uniform", "keyframes"]


@dataclass(frozen=True)
class Frame:
    """A picture of a video.

    Attributes:
        seconds: since the first frame.
        picture: anything that ``load_image`` reads.
    """

    seconds: float
    picture: Source

    @property
    def stamp(self) -> str:
        """Its time, as the model reads it."""
        return f"Time: {self.seconds:.1f}s"


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a video are looked at.

    A video with more frames than ``max_frames`` is looked at from its beginning to its end at larger steps.

    Attributes:
        fps: frames of a second, of ``uniform`` sampling.
        max_frames: at most.
        strategy: ``uniform`` takes what is seen at equal steps; ``keyframes`` what the file stores whole, which is
            where scenes change, and quick to decode. Animations store no others, so that all frames count.

    Raises:
        HerdError: a value is out of its range.
    """

    fps: float = 2.0
    max_frames: int = 32
    strategy: Strategy = "uniform"

    def __post_init__(self) -> None:
        _require_rate(self.fps)
        if isinstance(self.max_frames, bool) or not isinstance(self.max_frames, int):
            raise HerdError(f"max_frames is {shown(self.max_frames)}, a whole number is needed")
        if not 1 <= self.max_frames <= MOST_FRAMES:
            raise HerdError(f"max_frames is {self.max_frames}, it must be within 1 and {MOST_FRAMES}")
        if self.strategy not in get_args(Strategy):
            raise HerdError(f"a video's sampling is {shown(self.strategy)}, known are uniform and keyframes")

    @classmethod
    def of(cls, part: Mapping[str, Any]) -> FrameSampling:
        """As the part of a message has it: ``fps``, ``max_frames`` and ``sampling``, each of which may be missing."""
        given = {"fps": part.get("fps"), "max_frames": part.get("max_frames"), "strategy": part.get("sampling")}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def fields(self) -> dict[str, Any]:
        """What ``of`` reads, without what is the default."""
        named = {"fps": self.fps, "max_frames": self.max_frames, "sampling": self.strategy}
        usual = {"fps": FrameSampling.fps, "max_frames": FrameSampling.max_frames, "sampling": FrameSampling.strategy}
        return {name: value for name, value in named.items() if value != usual[name]}

    def choose(self, starts: Sequence[float], end: float, whole: Sequence[int]) -> list[int]:
        """Frames by their number.

        Args:
            starts: seconds at which each frame is first seen, ascending.
            end: seconds at which the last one goes.
            whole: frames that are stored whole, ascending.
        """
        if self.strategy == "keyframes":
            count = min(len(whole), self.max_frames)
            return [whole[index * len(whole) // count] for index in range(count)]
        length = end - starts[0]
        step = max(1 / self.fps, length / self.max_frames)
        count = min(max(math.ceil(length / step - 1e-6), 1), self.max_frames)
        times = starts[0] + step * np.arange(count) + 1e-6  # a start may be a hair later than it was meant
        return sorted({int(at) for at in np.searchsorted(np.asarray(starts), times, side="right") - 1})


def frames_at(pictures: Sequence[Source], fps: float) -> list[Frame]:
    """Pictures that were frames already, so many to the second.

    Raises:
        HerdError: none, too many, or no rate.
    """
    _require_rate(fps)
    if not 1 <= len(pictures) <= MOST_FRAMES:
        raise HerdError(f"a video is a list of {len(pictures)} frames, 1 to {MOST_FRAMES} are taken")
    return [Frame(index / fps, picture) for index, picture in enumerate(pictures)]


def reduced(image: Image.Image) -> Image.Image:
    """A frame with at most ``FRAME_SIDE`` pixels along a side."""
    image.thumbnail((FRAME_SIDE, FRAME_SIDE), Image.Resampling.BILINEAR)
    return image


def _require_rate(fps: Any) -> None:
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 1e-6 <= fps <= 1000:
        raise HerdError(f"fps is {shown(fps)}, a number above 0 and at most 1000 is needed")
