"""Every odd kind of picture and picture file."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from herdgraph.errors import HerdError
from herdgraph.model.processing import ImageProcessor, load_image, pictures

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


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
        with pytest.raises(HerdError, match=r"is not a regular file|is a directory"):
            load_image(endless)
    with pytest.raises(HerdError, match="the image data is a broken or unsafe image"):
        load_image(_encoded(NOISE)[:2000])
    with pytest.raises(HerdError, match="the image data is not an image"):
        load_image(b"")
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    with pytest.raises(HerdError, match="at most 1000 are read"):
        load_image(_encoded(NOISE))
    (tmp_path / "big.png").write_bytes(b"x" * 2000)
    with pytest.raises(HerdError, match=r"big\.png has 2000 bytes"):
        load_image(tmp_path / "big.png")


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


@pytest.mark.parametrize("name", ["a.png", "a.eps"])
def test_formats_that_start_programs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript is handed to Ghostscript by Pillow, whatever the file is called."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(HerdError, match="is not an image in a format that is read here: PNG"):
        load_image(tmp_path / name)
    with Image.open(tmp_path / name) as lazy, pytest.raises(HerdError, match="the image is a EPS, only PNG"):
        load_image(lazy)
    assert not (tmp_path / "was-run").exists()


def test_arrays_and_buffers() -> None:
    data = _encoded(Image.new("RGB", (2, 2), "lime"))
    for source in (bytearray(data), memoryview(data), np.full((2, 2, 3), (0, 255, 0), np.uint8),
                   np.full((2, 2, 4), (0, 255, 0, 255), np.uint8)):
        assert load_image(source).getpixel((1, 1)) == (0, 255, 0)
    assert load_image(np.full((2, 2), 7, np.uint8)).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize(("source", "message"), [
    (5, "a picture was given as int"), ([1], "a picture was given as list"), (None, "given as NoneType"),
    (np.zeros((2, 2)), r"an array of float64 \[2, 2\] is no picture"), (np.zeros((0, 2), np.uint8), "is no picture"),
    (np.zeros((2, 2, 2), np.uint8), "is no picture"), ("a\0b", "is no name of a file"), ("\udcff", "no"),
])
def test_sources_of_other_kinds(source: object, message: str) -> None:
    with pytest.raises(HerdError, match=message) as caught:
        load_image(source)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_settings_of_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's settings belong to the process: they are left as found, and count for nothing."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(HerdError, match="broken or unsafe"):
        load_image(_encoded(NOISE)[:2000])
    assert load_image(_encoded(NOISE)).size == (64, 64)
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    assert Image.MAX_IMAGE_PIXELS == 5


def test_16_bit_and_float() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    grey = np.asarray(load_image(_encoded(Image.fromarray(values))))[..., 0]
    np.testing.assert_array_equal(grey, np.round(values / 257))
    odd = np.array([[np.nan, np.inf], [-np.inf, 0.5]], np.float32)
    assert np.asarray(load_image(_encoded(Image.fromarray(odd), "TIFF")))[..., 0].tolist() == [[0, 255], [0, 128]]


@pytest.mark.parametrize(("kind", "options"), [
    ("PNG", {}), ("JPEG", {"quality": 95}), ("JPEG", {"quality": 95, "progressive": True}), ("TIFF", {}), ("WEBP", {}),
])
def test_large_pictures_are_reduced(kind: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tiles are those of the whole picture, but for the filter."""
    smooth = Image.linear_gradient("L").resize((900, 1200)).convert("RGB")
    data, processor = _encoded(smooth, kind, **options), ImageProcessor(side=28, max_patches=4)
    whole = processor.process(data)
    monkeypatch.setattr(pictures, "LARGEST_WHOLE", 300_000)
    reduced = load_image(data)
    assert 60_000 <= reduced.width * reduced.height <= 300_000
    found = processor.process(data)
    assert (found.rows, found.columns) == (whole.rows, whole.columns)
    assert np.abs(found.pixels - whole.pixels).max() < 0.06


def test_bands_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    transparent = NOISE.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize((64, 64)))
    for image in (NOISE, transparent, NOISE.convert("P"), NOISE.convert("LA"), NOISE.convert("CMYK")):
        monkeypatch.setattr(pictures, "_BAND", 1 << 18)
        whole = np.asarray(load_image(image))
        monkeypatch.setattr(pictures, "_BAND", 64 * 5)
        np.testing.assert_array_equal(np.asarray(load_image(image)), whole)


@pytest.mark.parametrize("image", [
    Image.new("I;16", (8000, 13000)), Image.new("L", (1, 200_000)), Image.new("RGBA", (9000, 6000)),
], ids=["16 bit", "long", "RGBA"])
def test_pictures_that_take_too_much(image: Image.Image) -> None:
    with pytest.raises(HerdError, match=r"at most \d+ are (allowed|accepted)"):
        load_image(_encoded(image, compress_level=1))


def test_scans_of_jpeg() -> None:
    """A JPEG in one scan takes next to nothing to decode, one in several all its coefficients."""
    for options, expected in (({}, 0), ({"progressive": True}, 3), ({"progressive": True, "subsampling": 0}, 6)):
        with Image.open(io.BytesIO(_encoded(NOISE, "JPEG", **options))) as image:
            assert pictures._coefficients(image) == expected


def test_peak_of_50_megapixels(tmp_path: Path) -> None:
    Image.new("RGB", (8000, 6250), "red").save(tmp_path / "a.png", compress_level=1)
    code = (
        "import resource, sys; from herdgraph.model.processing import ImageProcessor; import PIL.PngImagePlugin\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak()\n"
        "tiles = ImageProcessor().process(sys.argv[1]); print((peak() - before) * 1024 / 1e6)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 220


def test_broken_tiff_is_one_line() -> None:
    code = (
        "import io, sys; from PIL import Image; from herdgraph.model.processing import load_image\n"
        "buffer = io.BytesIO(); Image.effect_noise((64, 64), 50).save(buffer, 'TIFF', compression='tiff_lzw')\n"
        "whole = buffer.getvalue()\n"
        "for place in range(0, len(whole), 7):\n"
        "    try: load_image(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1:])\n"
        "    except Exception as error: print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"HerdError"}
    assert done.stderr == ""
