"""Pictures from strangers to upright 8-bit RGB, in bounded memory and by decoders that start no program.

Of a picture's formats only those of ``FORMATS`` are tried: Pillow would hand PostScript to Ghostscript. A picture is
decoded whole, which takes at most ``MAX_DECODED`` bytes, and converted in bands. Above ``LARGEST_WHOLE`` pixels, many
times what the tiles of any picture show, it is reduced on the way: JPEG by its decoder, others by averaging squares.
"""

from __future__ import annotations

import ctypes
import io
import logging
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import Image, ImageFile, UnidentifiedImageError

from ...errors import HerdError
from ...reading import open_file

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")
"""Formats that are read, as Pillow names them; MPO, the JPEG of some phones, is among JPEG."""
MAX_PIXELS = 178_956_970
"""Pillow's own limit, at which it begins to warn of a decompression bomb; here it is an error."""
MAX_SIDE = 100_000
"""Pixels of the longer side: every row costs memory of its own."""
MAX_DECODED = 200_000_000
"""Bytes that decoding a picture may take: 50 megapixels of PNG, more of JPEG, less of formats that need copies."""
MAX_BYTES = 256 << 20
"""Largest encoded picture that is read."""
LARGEST_WHOLE = 16_000_000
"""Pixels of the largest picture that is not reduced."""

_REDUCED = 4_000_000  # pixels at most of a picture that takes so much already that there is little room for another
_BAND = 1 << 18  # pixels that are converted at once

_COPIES = {"PNG": 0, "MPO": 0, "JPEG": 0, "GIF": 2, "BMP": 0, "PPM": 0, "WEBP": 12, "TIFF": 0, "ICO": 8}
"""Bytes per pixel that a format's decoder takes beside the picture."""
_NATIVE_DECODERS = ("zip", "jpeg", "gif", "raw", "libtiff")
_PYTHON_DECODER = 46
"""In the place of the above for Pillow's decoders in Python, which are slow: about 4 megapixels."""

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112

Source = str | Path | bytes | bytearray | memoryview | np.ndarray[Any, Any] | Image.Image

_ONE_AT_A_TIME = threading.Lock()


def load_image(source: Source) -> Image.Image:
    """A picture as upright 8-bit RGB.

    EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bit, of an animation the
    first frame is taken. Pictures of more than ``LARGEST_WHOLE`` pixels are reduced.

    Args:
        source: a path, the bytes of an encoded picture, a uint8 array [H, W] or [H, W, 3 or 4], or a Pillow image.

    Raises:
        HerdError: no such file, not a picture, broken, in another format, or too large.
    """
    with pillow_as_it_comes():
        if isinstance(source, (Image.Image, np.ndarray)):
            image = source if isinstance(source, Image.Image) else _of_array(source)
            upright, orientation = _checked(image, "the image")
        elif isinstance(source, (bytes, bytearray, memoryview)):
            if (size := memoryview(source).nbytes) > MAX_BYTES:
                raise HerdError(f"the image data has {size} bytes, at most {MAX_BYTES} are read: make it smaller")
            upright, orientation = _decoded(io.BytesIO(source), "the image data")
        elif isinstance(source, (str, Path)):
            with open_file(Path(source), most=MAX_BYTES) as file:
                upright, orientation = _decoded(file, str(source))
        else:
            raise HerdError(f"a picture was given as {type(source).__name__}: give a path, the bytes of a file, a "
                            "Pillow image or a uint8 array")
    turned = _TRANSPOSITIONS.get(orientation)
    return upright if turned is None else upright.transpose(turned)


@contextmanager
def pillow_as_it_comes() -> Iterator[None]:
    """Pillow with the settings that it comes with and without warnings, whatever other libraries have set.

    They belong to the process, so that one picture is decoded at a time; this bounds the memory, too.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        found = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, MAX_PIXELS
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = found


def _of_array(array: np.ndarray[Any, Any]) -> Image.Image:
    grey = array.ndim == 2
    if array.dtype != np.uint8 or not array.size or not (grey or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise HerdError(f"an array of {array.dtype} {list(array.shape)} is no picture: give uint8 of shape [H, W], "
                        "[H, W, 3] or [H, W, 4]")
    return Image.fromarray(array)


def _decoded(file: BinaryIO, name: str) -> tuple[Image.Image, int]:
    with decoding(name), Image.open(file, formats=FORMATS) as image:
        require_memory(image, name)
        return _checked(image, name)


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Whatever goes wrong inside is told of the file of that name.

    Raises:
        HerdError: it is no picture, broken, or too large.
    """
    try:
        yield
    except UnidentifiedImageError as error:
        raise HerdError(f"{name} is not an image in a format that is read here: {', '.join(FORMATS)}") from error
    except MemoryError as error:
        raise HerdError(f"there is not enough memory for {name}: make it smaller") from error
    except HerdError:
        raise
    except Exception as error:  # whatever a decoder raises, it is about this file
        raise HerdError(f"{name} is a broken or unsafe image: {' '.join(str(error).split())}") from error


def require_memory(image: ImageFile.ImageFile, name: str) -> None:
    """Refuse a file that takes too much to decode; of a large JPEG ask for less.

    Raises:
        HerdError: it takes more than ``MAX_DECODED`` bytes.
    """
    pixels, codecs = image.width * image.height, {tile.codec_name for tile in image.tile}
    cost: float = _COPIES.get(image.format or "", 0) if codecs <= {*_NATIVE_DECODERS} else _PYTHON_DECODER
    if image.format == "TIFF":
        cost += _strips(image)
    elif codecs == {"jpeg"} and image.format in ("JPEG", "MPO"):
        cost += _coefficients(image)
        scale = 1 << (_reduction(pixels, int(pixels * cost)) - 1).bit_length()  # the decoder's own steps
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
    needed = int(pixels * cost) + image.width * image.height * _stored(image.mode)
    if needed > MAX_DECODED:
        raise HerdError(f"{name} has {pixels} pixels, which take {needed >> 20} MB to decode as {image.format}, at "
                        f"most {MAX_DECODED >> 20} are allowed: make it smaller")


def _coefficients(image: Any) -> float:
    """Bytes per pixel that a JPEG in several scans takes: the decoder keeps all coefficients, 2 bytes each."""
    if not image.info.get("progressive") and _starts_with_all_components(image):
        return 0
    widest, highest = (max(layer[axis] for layer in image.layer) for axis in (1, 2))
    return 2 * sum(layer[1] * layer[2] for layer in image.layer) / (widest * highest)


def _starts_with_all_components(image: Any) -> bool:
    """Whether the header of the first scan, which ends where Pillow stopped reading, names all components."""
    position, count = image.fp.tell(), image.layers
    image.fp.seek(max(position - 8 - 2 * count, 0))
    header = image.fp.read(8 + 2 * count)
    image.fp.seek(position)
    tables = header[6 : 6 + 2 * count : 2]
    return header[:5] == bytes((0xFF, 0xDA, 0, 6 + 2 * count, count)) and max(tables) <= 0x33


def _strips(image: Any) -> float:
    """Bytes per pixel that a TIFF takes whose only strip is the whole picture, and a second copy where it is turned."""
    bits = image.tag_v2.get(258, (1,))
    turned = image.tag_v2.get(274, 1) != 1
    return len(image.getbands()) * max(bits) / 8 + (_stored(image.mode) if turned else 0)


def _checked(image: Image.Image, name: str) -> tuple[Image.Image, int]:
    """The picture in RGB, and how it is to be turned."""
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise HerdError(f"{name} has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are accepted, and "
                        f"{MAX_SIDE} along a side")
    if image.format not in (*_COPIES, None):
        raise HerdError(f"{name} is a {image.format}, only {', '.join(FORMATS)} are read")
    image.seek(0)
    image.load()
    pixels = image.width * image.height
    factor = _reduction(pixels, pixels * _stored(image.mode))
    return rgb(image, factor), image.getexif().get(_ORIENTATION, 1)


def _stored(mode: str) -> int:
    """Bytes of a pixel in memory."""
    return 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4


def _reduction(pixels: int, decoded: int) -> int:
    """By how much both sides are divided."""
    room = LARGEST_WHOLE if decoded + 4 * LARGEST_WHOLE <= MAX_DECODED else _REDUCED
    return math.ceil(math.sqrt(pixels / room)) if pixels > LARGEST_WHOLE else 1


def rgb(image: Image.Image, factor: int) -> Image.Image:
    """The picture in RGB, reduced by a whole factor, band by band."""
    rgb = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    step = max(_BAND // image.width // factor, 1) * factor
    for top in range(0, image.height, step):
        band = _band_rgb(image.crop((0, top, image.width, min(top + step, image.height))))
        rgb.paste(band.reduce(factor) if factor > 1 else band, (0, top // factor))
    return rgb


def _band_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bit (which Pillow would clip at 255) or of float in 0..1 scaled to 8 bit."""
    values = np.nan_to_num(np.asarray(image, np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    values = values * 255 if image.mode == "F" else values / 257
    return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))


def _silence() -> None:
    """Complaints about a broken file belong into one error: libtiff, as Pillow's wheels bring it, writes them to the
    standard error, and Pillow logs some, which Python shows there when a program has no logging of its own.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    for path in (Path(PIL.__file__).parents[1] / "pillow.libs").glob("libtiff*"):
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path))
            library.TIFFSetErrorHandler(ctypes.c_void_p(None))
            library.TIFFSetWarningHandler(ctypes.c_void_p(None))


_silence()
