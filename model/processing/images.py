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

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import HerdError
from ...reading import read_optional_json
from .frames import Frame
from .pictures import Source, load_image

MOST_TILES = 64
"""Tiles of a picture, four times those of the released models: at 336 pixels they take 87 MB."""


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
        if not 1 <= self.max_patches <= MOST_TILES:
            raise HerdError(f"max_patches is {self.max_patches}, it must be within 1 and {MOST_TILES}")
        usual = all(abs(mean) <= 1e6 for mean in self.mean) and all(1e-6 <= abs(std) <= 1e6 for std in self.std)
        if not len(self.mean) == len(self.std) == 3 or not usual:
            raise HerdError(f"images are normalised by mean {self.mean} and std {self.std}, three numbers each of at "
                            "most 1e6, and no std below 1e-6, are needed")

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

    def process(self, source: Source | Frame) -> TiledImage:
        """Load a picture and cut it into tiles; the frame of a video has one.

        Raises:
            HerdError: the picture cannot be read (see ``load_image``).
        """
        if isinstance(source, Frame):
            return replace(self, max_patches=1).process(source.picture)
        image = load_image(source)
        height, width = self.canvas(image.height, image.width)
        padded = np.zeros((height, width, 3), np.uint8)
        fitted = self._fit(image, height, width)
        padded[: fitted.height, : fitted.width] = np.asarray(fitted)
        rows, columns = height // self.side, width // self.side
        tiles = list(padded.reshape(rows, self.side, columns, self.side, 3).swapaxes(1, 2).reshape(
            rows * columns, self.side, self.side, 3))
        if rows * columns > 1:
            tiles.append(np.asarray(image.resize((self.side, self.side), Image.Resampling.BILINEAR)))
        pixels = np.empty((len(tiles), 3, self.side, self.side), np.float32)
        for index, tile in enumerate(tiles):
            pixels[index] = self._normalised(tile)
        return TiledImage(pixels, rows, columns)

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

    def _normalised(self, tile_HWC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        scaled = tile_HWC.astype(np.float32) / 255
        normal = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return normal.transpose(2, 0, 1)


@cache
def _grids(tiles: int) -> tuple[tuple[int, int], ...]:
    """All (rows, columns) with at most ``tiles`` tiles, in the reference's order: it decides between equal areas."""
    by_ratio: dict[float, list[tuple[int, int]]] = {}
    for count in range(tiles, 0, -1):
        for rows in (rows for rows in range(1, count + 1) if count % rows == 0):
            by_ratio.setdefault(rows / (count // rows), []).append((rows, count // rows))
    return tuple(grid for grids in by_ratio.values() for grid in grids)
