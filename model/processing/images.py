"""Pictures to tiles, as Llama 4 was trained to see them.

A picture is shown as a grid of square tiles and, when there is more than one, once more as a whole (the global tile).

1. Canvas: of all grids of h x w tiles with h · w <= max_patches, scale = min(w_canvas / w, h_canvas / h). If any scale
   is at least 1, the smallest such; else the largest. Several canvases with that scale: the one of least area.
2. Resize to fit the canvas, aspect kept; enlarging stops at one tile's side. Bilinear with antialiasing.
3. Pad right and bottom with black, scale to 0..1, normalise, cut into tiles row by row.
4. More than one tile: append the picture resized, aspect changed, to a single tile.

Source: llama-models ``preprocess.py`` and transformers ``image_processing_llama4.py``. Resizing is done on 8-bit
pixels and normalisation in float32; transformers normalises in bfloat16, a difference of up to 0.01.
"""

from __future__ import annotations

import io
import stat
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...errors import HerdError
from ...reading import read_optional_json

MAX_PIXELS = 178_956_970
"""Pillow's own limit, at which it begins to warn of a decompression bomb; here it is an error."""
MAX_BYTES = 256 << 20
"""Largest encoded picture that is read."""

_MOST_TILES = 1024

Source = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class TiledImage:
    """A picture as the image tower takes it.

    Attributes:
        pixels: float32 [tiles, 3, side, side], normalised; the global tile last when there are several.
        rows: tiles from top to bottom.
        columns: tiles from left to right.
    """

    pixels: np.ndarray[Any, Any]
    rows: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Tiling and normalisation options, by default those of the released models.

    Attributes:
        side: pixels along a tile.
        max_patches: most tiles of a picture, the global one not counted.
        mean: subtracted from each channel in 0..1.
        std: divides each channel.
        resize_to_max_canvas: enlarge to the largest canvas that fits.
    """

    side: int = 336
    max_patches: int = 16
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resize_to_max_canvas: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_patches <= _MOST_TILES:
            raise HerdError(f"max_patches is {self.max_patches}, it must be within 1 and {_MOST_TILES}")
        if not len(self.mean) == len(self.std) == 3 or not all(self.std):
            raise HerdError(f"images are normalised by mean {self.mean} and std {self.std}, three numbers each and no "
                            "std of 0 are needed")

    @classmethod
    def from_directory(cls, directory: Path, side: int) -> ImageProcessor:
        """Options of a checkpoint's ``preprocessor_config.json`` or ``processor_config.json``.

        Args:
            directory: of the checkpoint; without the files the defaults hold.
            side: tile side of the model, which has the last word.

        Raises:
            HerdError: an option is impossible.
        """
        raw = read_optional_json(directory / "preprocessor_config.json")
        raw = raw or read_optional_json(directory / "processor_config.json").get("image_processor", {})
        default = cls()
        try:
            return cls(
                side=side,
                max_patches=int(raw.get("max_patches", default.max_patches)),
                mean=tuple(map(float, raw.get("image_mean", default.mean))),
                std=tuple(map(float, raw.get("image_std", default.std))),
                resize_to_max_canvas=bool(raw.get("resize_to_max_canvas", False)),
            )
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise HerdError(f"the image processor's options in {directory} have a value of the wrong kind: "
                            "compare them with the original") from error

    def process(self, source: Source) -> TiledImage:
        """Load a picture and cut it into tiles.

        Raises:
            HerdError: the picture cannot be read (see ``load_image``).
        """
        image = load_image(source)
        height, width = self.canvas(image.height, image.width)
        padded = np.zeros((height, width, 3), np.uint8)
        fitted = self._fit(image, height, width)
        padded[: fitted.height, : fitted.width] = np.asarray(fitted)
        rows, columns = height // self.side, width // self.side
        grid = padded.reshape(rows, self.side, columns, self.side, 3).swapaxes(1, 2)
        tiles = grid.reshape(rows * columns, self.side, self.side, 3)
        if rows * columns > 1:
            whole = image.resize((self.side, self.side), Image.Resampling.BILINEAR)
            tiles = np.concatenate((tiles, np.asarray(whole)[None]))
        return TiledImage(self._normalised(tiles), rows, columns)

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the canvas for a picture, in pixels."""
        canvases = np.array(_grids(self.max_patches)) * self.side
        # float32, as in the reference: ties between canvases are decided by equality.
        scales = (canvases / np.array([height, width])).astype(np.float32).min(axis=1)
        enlarging = scales[scales >= 1]
        if not enlarging.size:
            chosen = scales.max()
        else:
            chosen = enlarging.max() if self.resize_to_max_canvas else enlarging.min()
        fitting = canvases[scales == chosen]
        best = fitting[fitting.prod(axis=1).argmin()]
        return int(best[0]), int(best[1])

    def _fit(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """Resize into the canvas with the aspect kept."""
        if not self.resize_to_max_canvas:
            height, width = min(max(image.height, self.side), height), min(max(image.width, self.side), width)
        by_width, by_height = width / image.width, height / image.height
        if by_width < by_height:
            size = (width, min(int(image.height * by_width), height))
        else:
            size = (min(int(image.width * by_height), width), height)
        return image.resize((max(size[0], 1), max(size[1], 1)), Image.Resampling.BILINEAR)

    def _normalised(self, tiles_NHWC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        scaled = tiles_NHWC.astype(np.float32) / 255
        normal = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(0, 3, 1, 2), np.float32)


@cache
def _grids(tiles: int) -> tuple[tuple[int, int], ...]:
    """All (rows, columns) with at most ``tiles`` tiles, in the reference's order: it decides between equal areas."""
    by_ratio: dict[float, list[tuple[int, int]]] = {}
    for count in range(tiles, 0, -1):
        for rows in (rows for rows in range(1, count + 1) if count % rows == 0):
            by_ratio.setdefault(rows / (count // rows), []).append((rows, count // rows))
    return tuple(grid for grids in by_ratio.values() for grid in grids)


def load_image(source: Source) -> Image.Image:
    """A picture as upright 8-bit RGB.

    EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bit, of an animation the
    first frame is taken.

    Args:
        source: a path, the bytes of an encoded picture, or a Pillow image.

    Raises:
        HerdError: no such file, not a picture, broken, or larger than ``MAX_BYTES`` or ``MAX_PIXELS``.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "the image")
    name = "the image data" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else _read(Path(source))
    if len(data) > MAX_BYTES:
        raise HerdError(f"{name} has {len(data)} bytes, at most {MAX_BYTES} are read: make it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                return _upright_rgb(image, name)
    except UnidentifiedImageError as error:
        raise HerdError(f"{name} is not an image in a format that Pillow reads") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise HerdError(f"{name} is a broken or unsafe image: {error}") from error


def _read(path: Path) -> bytes:
    try:
        found = path.stat()
        if found.st_size > MAX_BYTES:
            raise HerdError(f"{path} has {found.st_size} bytes, at most {MAX_BYTES} are read: make it smaller")
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device may never end
            raise HerdError(f"image {path} is not a regular file: give the path of a picture")
        return path.read_bytes()
    except OSError as error:
        raise HerdError(f"image {path} cannot be read ({error.strerror}): give the path of a picture") from error


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise HerdError(f"{name} has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are accepted")
    image.seek(0)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bit (which Pillow would clip at 255) or of float in 0..1 scaled to 8 bit."""
    values = np.asarray(image, np.float64)
    values = values * 255 if image.mode == "F" else values / 257
    return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))
