"""What is shown beside a text: pictures and videos, by options of the commands and in a chat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..options import COUNT, PATH, Number

if TYPE_CHECKING:
    from ..model.processing import FrameSampling

Part = dict[str, Any]
"""A picture or video in a message."""


@dataclass(frozen=True)
class Attachments:
    """Files that options name.

    Attributes:
        images: pictures.
        videos: come behind them.
        sampling: which frames of videos are looked at, None for the default.
    """

    images: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()
    sampling: FrameSampling | None = None

    def __bool__(self) -> bool:
        return bool(self.images or self.videos)

    def parts(self, picture: Callable[[Path], Any], video: Callable[[Path, FrameSampling | None], Any]) -> list[Part]:
        """The parts of a message, read by the given functions."""
        return [*(image_part(picture(path)) for path in self.images),
                *(video_part(video(path, self.sampling)) for path in self.videos)]


def image_part(image: Any) -> Part:
    """A picture in a message."""
    return {"type": "image", "image": image}


def video_part(video: Any) -> Part:
    """A video in a message."""
    return {"type": "video", "video": video}


_OPTIONS = (
    click.option("--image", "images", type=PATH, multiple=True,
                 help="Picture to look at; may be repeated. With --raw, the prompt says where by <|image|>."),
    click.option("--video", "videos", type=PATH, multiple=True,
                 help="Video to look at (MP4, WebM, animated GIF or WebP); may be repeated."),
    click.option("--video-fps", type=Number(min=0, min_open=True), show_default="2",
                 help="Frames of a second of video that are looked at."),
    click.option("--video-frames", type=COUNT, show_default="32",
                 help="Most frames of a video; a longer one is looked at in larger steps."),
    click.option("--video-sampling", type=click.Choice(["uniform", "keyframes"]), show_default="uniform",
                 help="Frames at equal steps, or those that the file stores whole."),
)


def attachment_options(command: Any) -> Any:
    """Add the options; the command gets them as one argument ``attachments``."""
    @wraps(command)
    def gathered(
        *args: Any, images: tuple[Path, ...], videos: tuple[Path, ...], video_fps: float | None,
        video_frames: int | None, video_sampling: str | None, **others: Any,
    ) -> Any:
        sampling = None
        if videos or video_fps or video_frames or video_sampling:
            from ..model.processing import FrameSampling

            sampling = FrameSampling.of({"fps": video_fps, "max_frames": video_frames, "sampling": video_sampling})
        return command(*args, attachments=Attachments(images, videos, sampling), **others)

    for option in reversed(_OPTIONS):
        gathered = option(gathered)
    return gathered
