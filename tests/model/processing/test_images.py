"""Tiles against transformers' image processor, and every odd kind of picture file."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

from herdgraph.errors import HerdError
from herdgraph.model.processing import ImageProcessor, load_image, pictures

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


def _encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, int, int]:
    return load_image(data).getpixel(at)


def test_load_image_modes() -> None:
    assert _pixel(_encoded(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert _pixel(_encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert _pixel(_encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == (255, 255, 255), "transparent is white"
    assert _pixel(_encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 255)))) == (255, 0, 0)
    assert _pixel(_encoded(Image.new("LA", (4, 4), (0, 128)))) == (127, 127, 127)
    assert _pixel(_encoded(Image.new("P", (4, 4), 3))) == Image.new("P", (4, 4), 3).convert("RGB").getpixel((0, 0))
    assert max(_pixel(_encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"))[1:]) < 40
    deep = Image.fromarray(np.full((4, 4), 257 * 200, np.uint16))
    assert _pixel(_encoded(deep)) == (200, 200, 200), "16 bit is scaled, not clipped"
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9] * 256)
    assert _pixel(_encoded(palette, transparency=0)) == (255, 255, 255)


def test_load_image_orientation() -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    upright = load_image(_encoded(image, exif=exif))
    assert upright.size == (4, 8)
    assert upright.getpixel((3, 0)) == (255, 255, 255)


def test_load_image_animation() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    assert _pixel(_encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)


def test_load_image_sources(tmp_path: Path) -> None:
    data = _encoded(Image.new("RGB", (2, 2), "lime"))
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(io.BytesIO(data))):
        assert load_image(source).getpixel((1, 1)) == (0, 255, 0)


def test_load_image_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(HerdError, match=r"text\.png is not an image"):
        load_image(tmp_path / "text.png")
    with pytest.raises(HerdError, match=r"none\.png cannot be read: No such file or directory"):
        load_image(tmp_path / "none.png")
    os.mkfifo(tmp_path / "fifo.png")
    for endless in (tmp_path, tmp_path / "fifo.png", Path("/dev/zero")):
        with pytest.raises(HerdError, match="is not a regular file|is a directory"):
            load_image(endless)
    with pytest.raises(HerdError, match="the image data is a broken or unsafe image"):
        load_image(_encoded(_noise(64, 64))[:2000])
    with pytest.raises(HerdError, match="the image data is not an image"):
        load_image(b"")
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    with pytest.raises(HerdError, match="at most 1000 are read"):
        load_image(_encoded(_noise(64, 64)))
    (tmp_path / "big.png").write_bytes(b"x" * 2000)
    with pytest.raises(HerdError, match=r"big\.png has 2000 bytes"):
        load_image(tmp_path / "big.png")


@pytest.mark.parametrize(("options", "message"), [
    ({"max_patches": 10**9}, "max_patches is 1000000000, it must be within 1 and 64"),
    ({"max_patches": "many"}, "have a value of the wrong kind"), ({"image_mean": 5}, "have a value of the wrong kind"),
    ({"image_mean": [0.5]}, "three numbers each"), ({"image_std": [0, 1, 1]}, "no std of 0"),
])
def test_option_refusals(options: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(options))
    with pytest.raises(HerdError, match=message):
        ImageProcessor.from_directory(tmp_path, 28)


def test_decompression_bombs() -> None:
    bomb = _encoded(Image.new("1", (20_000, 10_000)))
    assert len(bomb) < 100_000
    with pytest.raises(HerdError, match=r"178956970"):
        load_image(bomb)
    with pytest.raises(HerdError, match="20000 x 10000 pixels, at most 178956970 are accepted"):
        load_image(Image.new("1", (20_000, 10_000)))
    huge = _encoded(Image.new("1", (40_000, 20_000)))
    with pytest.raises(HerdError, match="the image data is a broken or unsafe image: Image size"):
        load_image(huge)
