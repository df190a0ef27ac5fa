"""Tiles against transformers' image processor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

from herdgraph.errors import HerdError
from herdgraph.model.processing import ImageProcessor

OURS, THEIRS = ImageProcessor(), Llama4ImageProcessor()
# One 8-bit level of resizing is 2/255 = 0.008 after normalisation; transformers rounds to bfloat16 twice: below 0.01.
TOLERANCE = 0.02
SIZES = [(336, 336), (1, 1), (10, 500), (337, 336), (1000, 333), (640, 480), (480, 640), (2000, 1500), (5000, 80),
         (1344, 1344), (300, 300), (672, 336), (17, 3)]


def _noise(width: int, height: int) -> Image.Image:
    """A picture with edges, gradients and noise."""
    random = np.random.default_rng(width * 10_000 + height)
    pixels = random.integers(0, 256, (height, width, 3)) // 2
    pixels += np.linspace(0, 127, width, dtype=int)[None, :, None]
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_match_transformers(size: tuple[int, int]) -> None:
    image = _noise(*size)
    found, expected = OURS.process(image), THEIRS.preprocess(image, return_tensors="pt")
    assert [found.rows, found.columns] == expected["aspect_ratios"][0].tolist()
    reference = expected["pixel_values"].float().numpy()
    assert found.pixels.shape == reference.shape
    assert found.pixels.dtype == np.float32
    assert np.abs(found.pixels - reference).max() <= TOLERANCE
    assert np.abs(found.pixels - reference).mean() <= 0.003


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 6000), height=st.integers(1, 6000))
def test_canvas_matches_transformers(width: int, height: int) -> None:
    import torch
    from transformers.image_utils import SizeDict
    from transformers.models.llama4.image_processing_llama4 import find_supported_resolutions, get_best_fit

    candidates = torch.tensor(find_supported_resolutions(16, SizeDict(height=336, width=336)))
    assert OURS.canvas(height, width) == tuple(get_best_fit((height, width), candidates).tolist())


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 900), height=st.integers(1, 900))
def test_tiles_of_any_size(width: int, height: int) -> None:
    tiled = OURS.process(Image.new("RGB", (width, height), "white"))
    tiles = tiled.rows * tiled.columns
    assert tiled.pixels.shape == (tiles + (tiles > 1), 3, 336, 336)
    assert tiles <= 16
    assert (tiled.pixels[0, :, 0, 0] == 1).all(), "the picture begins at the top left"
    assert tiled.pixels.min() >= -1


def test_options_of_checkpoint(tmp_path: Path) -> None:
    assert ImageProcessor.from_directory(tmp_path, 336) == ImageProcessor()
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"max_patches": 2, "image_mean": [0, 0, 0]}}')
    assert ImageProcessor.from_directory(tmp_path, 28).max_patches == 2
    (tmp_path / "preprocessor_config.json").write_text('{"max_patches": 4, "image_std": [1, 1, 1]}')
    found = ImageProcessor.from_directory(tmp_path, 28)
    assert (found.side, found.max_patches, found.std) == (28, 4, (1, 1, 1))


def test_resize_to_max_canvas() -> None:
    options = {"resize_to_max_canvas": True}
    found = ImageProcessor(**options).process(_noise(200, 150))
    expected = THEIRS.preprocess(_noise(200, 150), return_tensors="pt", **options)
    assert [found.rows, found.columns] == expected["aspect_ratios"][0].tolist()
    assert np.abs(found.pixels - expected["pixel_values"].float().numpy()).max() <= TOLERANCE


@pytest.mark.parametrize(("options", "message"), [
    ({"max_patches": 10**9}, "max_patches is 1000000000, it must be within 1 and 64"),
    ({"max_patches": "many"}, "have a value of the wrong kind"), ({"image_mean": 5}, "have a value of the wrong kind"),
    ({"image_mean": [0.5]}, "three numbers each"), ({"image_std": [0, 1, 1]}, "no std below 1e-6"),
    ({"image_std": [1, 1, 5e-324]}, "no std below"), ({"image_mean": [1e300, 0, 0]}, "at most 1e6"),
])
def test_option_refusals(options: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(options))
    with pytest.raises(HerdError, match=message):
        ImageProcessor.from_directory(tmp_path, 28)
