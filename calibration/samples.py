"""Calibration data: samples of any kind (``model/data``), of several sources in turn, or the default.

The default is pages of the Jargon File and, for models that see, drawn pictures. Neither is the data that a model will
meet, so the command warns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..model.data import Picture, Record, Samples, TextFile, open_samples

DEFAULT_TEXT = Path(__file__).parent / "data" / "default_text.txt"
PAGE = 512
"""Characters of a text file that are read together, at least."""


def read_samples(paths: Iterable[Path], *, images: bool) -> Iterator[Record]:
    """Samples of files and directories, one of each in turn; the default when none is given.

    Args:
        paths: as in the table of ``model/data/sources.py``.
        images: whether the model sees; the default has pictures then.

    Raises:
        HerdError: nothing there, a file of an unknown kind, or a line that is no sample.
    """
    sources = [_read(path) for path in paths]
    if not sources:
        sources = [_read(DEFAULT_TEXT), *([drawn()] if images else [])]
    while sources:  # in turn, so that a long text leaves room for what was given beside it
        for source in list(sources):
            if (sample := next(source, None)) is None:
                sources.remove(source)
            else:
                yield sample


def _read(path: Path) -> Iterator[Record]:
    samples: Samples = open_samples([path])
    for index in range(len(samples)):
        yield from pages(samples[index]) if isinstance(samples, TextFile) else [samples[index]]


def pages(document: Record) -> Iterator[Record]:
    """A plain text in pages that end with a word."""
    for page in re.finditer(rf"(?s).{{{PAGE}}}\S*\s*|.+", document.completion()):
        yield Record(document.key, document.origin, document=(page[0],))


def drawn(count: int = 8, seed: int = 0) -> Iterator[Record]:
    """Pictures made of gradients, shapes and noise, in several proportions."""
    random = np.random.default_rng(seed)
    for number in range(count):
        width, height = (int(side) for side in random.integers(200, 700, 2))
        x, y = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
        colors = random.uniform(0, 255, (3, 3))
        pixels = colors[0] * x + colors[1] * y * (1 - x) + colors[2] * (1 - y) * (1 - x)
        pixels += random.normal(0, 12, pixels.shape)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for _ in range(6):
            corner = random.uniform(0, 0.8, 2) * (width, height)
            box = [*corner, *(corner + random.uniform(0.05, 0.4, 2) * (width, height))]
            shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
            shape(box, fill=tuple(int(c) for c in random.integers(0, 256, 3)))
        origin = f"drawn picture {number}"
        yield Record(origin, origin, document=(Picture(image),))
