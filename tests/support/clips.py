"""Small videos, made where a test needs them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

from PIL import Image

COLORS = ("red", "lime", "blue", "white")


def frames(colors: Sequence[str] = COLORS, side: int = 32) -> list[Image.Image]:
    """One picture of each color."""
    return [Image.new("RGB", (side, side), color) for color in colors]


def film(
    pictures: Sequence[Image.Image], *, fps: int | Fraction = 2, kind: str = "mp4", codec: str = "", every: int = 2
) -> bytes:
    """A film of pictures; every so many of them begins a group."""
    import av

    written = io.BytesIO()
    with av.open(written, "w", format=kind) as container:
        track = container.add_stream(codec or {"mp4": "libx264", "webm": "libvpx"}[kind], rate=fps)
        track.width, track.height = pictures[0].size
        track.pix_fmt, track.gop_size = "yuv420p", every
        for picture in pictures:
            container.mux(track.encode(av.VideoFrame.from_image(picture)))
        container.mux(track.encode())
    return written.getvalue()


def animation(pictures: Sequence[Image.Image], *, kind: str = "webp", milliseconds: int = 500) -> bytes:
    """An animation of pictures."""
    written = io.BytesIO()
    pictures[0].save(written, kind.upper(), save_all=True, append_images=list(pictures[1:]), duration=milliseconds)
    return written.getvalue()
