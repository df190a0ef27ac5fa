"""Headers of safetensors files: where each tensor lies, checked against the file before anything is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from ....errors import HerdError
from ....reading import open_file, parse_json, require_within
from .lazy import FileTensor

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}

MOST_BYTES = 100_000_000
"""Largest header, the library's own limit: half a million tensors."""

_AGAIN = "get or write it again"


class _Entry(msgspec.Struct):
    """What a header says of one tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_header(path: Path) -> dict[str, FileTensor]:
    """Tensors of a safetensors file by their stored names. Only the header is read.

    Raises:
        HerdError: not a safetensors file, cut off, or with a tensor of an unknown type.
    """
    content, begin, size = _content(path)
    entries = {name: _entry(path, name, entry) for name, entry in content.items() if name != "__metadata__"}
    needed = begin + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if needed > size:
        raise HerdError(f"{path} is damaged or cut off: its header describes {needed} bytes, the file has {size}; "
                        f"{_AGAIN}")
    _check(path)
    return {name: FileTensor(path, begin + entry.data_offsets[0], tuple(entry.shape), _DTYPES[entry.dtype])
            for name, entry in entries.items()}


def _content(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, the file position from which its offsets count, and the file's size."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise HerdError(f"{path} is damaged or cut off: its header takes {length} bytes, the file has {size}; "
                            f"{_AGAIN}")
        text = file.read(require_within(f"the bytes of the header of {path}", length, MOST_BYTES))
    content = parse_json(text, f"{path} is damaged or cut off: its header", _AGAIN)
    if not isinstance(content, dict):
        raise HerdError(f"{path} is damaged or cut off: its header is not a JSON object; {_AGAIN}")
    return content, 8 + length, size


def _entry(path: Path, name: str, raw: object) -> _Entry:
    try:
        entry = msgspec.convert(raw, _Entry)
    except msgspec.ValidationError as error:
        raise HerdError(f"{path} is damaged or cut off: {error} in {name[:200]!r}; {_AGAIN}") from error
    if entry.dtype not in _DTYPES:
        raise HerdError(f"{path} holds a tensor of type {entry.dtype[:50]}, which is not supported: use "
                        f"{', '.join(_DTYPES)}")
    if min(*entry.data_offsets, *entry.shape) < 0:
        raise HerdError(f"{path} is damaged or cut off: a negative size or place of {name[:200]!r}; {_AGAIN}")
    return entry


def _check(path: Path) -> None:
    """The library checks the rest: offsets against shapes, gaps, overlaps. Under numpy it does not map the file
    privately, which would need as much free memory as the file is long.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise HerdError(f"{path} is damaged or cut off ({error}): {_AGAIN}") from error
