"""Pictures that are to take all memory or time of who decodes them, or to confuse it."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

from PIL import Image

Body = dict[str, Any]


def picture_chat(urls: list[str]) -> Body:
    """A chat about pictures."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, *parts]}],
            "max_tokens": 2, "temperature": 0}


def bombs() -> dict[str, list[str]]:
    """By what is wrong with it: the URLs of one request."""
    dot, flat = _saved("PNG", (1, 1)), zlib.compress(bytes(50 << 20), 9)
    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixel = zlib.compress(bytes(4))
    return {
        "one picture": [_url(dot)],
        "100 pictures": [_url(dot)] * 100,
        "huge sides": [_url(_png(struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 6, 0, 0, 0), pixel))],
        "no sides": [_url(_png(struct.pack(">IIBBBBB", 0, 0, 8, 6, 0, 0, 0), pixel))],
        "65535 x 65535": [_url(_png(struct.pack(">IIBBBBB", 65535, 65535, 1, 0, 0, 0, 0), flat[:5000]))],
        "13000 x 13000": [_url(_png(struct.pack(">IIBBBBB", 13000, 13000, 8, 0, 0, 0, 0), _rows(13000)))],
        "7000 x 7000": [_url(_png(struct.pack(">IIBBBBB", 7000, 7000, 8, 0, 0, 0, 0), _rows(7000)))],
        "one row": [_url(_png(struct.pack(">IIBBBBB", 178_000_000, 1, 1, 0, 0, 0, 0), pixel))],
        "bomb in pixels": [_url(_png(header, flat))],
        "bomb in a text": [_url(_png(header, pixel, (b"zTXt", b"k\0\0" + flat)))],
        "bomb in a profile": [_url(_png(header, pixel, (b"iCCP", b"k\0\0" + flat)))],
        "many texts": [_url(_png(header, pixel, *[(b"tEXt", b"k\0" + b"v" * 100)] * 50_000))],
        "chunk lies": [_url(dot[:8] + struct.pack(">I", 2**31 - 1) + dot[12:])],
        "cut off": [_url(_saved("PNG", (500, 500))[:-40])],
        "2000 frames": [_url(_animated(2000))],
        "tiff": [_url(_saved("TIFF", (64, 64)), "tiff")],
        "tiff that lies": [_url(b"II*\0\x08\0\0\0\xff\xff" + b"\0\1\4\0\xff\xff\xff\x7f\xff\xff\xff\x7f" * 300)],
        "svg": [_url(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "svg+xml")],
        "postscript": [_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n", "eps")],
        "bmp that lies": [_url(b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 1, 1,
                                                   0, 0), "bmp")],
        "broken base64": ["data:image/png;base64,@@@@"],
        "half base64": [_url(dot)[:-3]],
        "no base64": ["data:image/png," + "%00" * 100],
        "nothing": ["data:image/png;base64,"],
        "20 MB of base64": ["data:image/png;base64," + "A" * (20 << 20)],
    }


def _url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _png(header: bytes, pixels: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts)


def _rows(side: int) -> bytes:
    """The pixels of a black square, compressed."""
    return zlib.compress(bytes(side * (side + 1)), 9)


def _saved(kind: str, size: tuple[int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, "brown").save(data, kind)
    return data.getvalue()


def _animated(frames: int) -> bytes:
    data = io.BytesIO()
    pictures = [Image.new("P", (200, 200), number % 256) for number in range(frames)]
    pictures[0].save(data, "GIF", save_all=True, append_images=pictures[1:])
    return data.getvalue()
