"""Headers of safetensors files: where each tensor lies, checked against the file before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ....errors import HerdError
from .lazy import FileTensor

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}


def read_header(path: Path) -> dict[str, FileTensor]:
    """Tensors of a safetensors file by their stored names. Only the header is read.

    Raises:
        HerdError: not a safetensors file, cut off, or with a tensor of an unknown type.
    """
    entries, begin = _entries(path)
    _check(path, entries, begin)
    unknown = next((entry["dtype"] for entry in entries.values() if entry["dtype"] not in _DTYPES), None)
    if unknown is not None:
        raise HerdError(f"{path} holds a tensor of type {unknown}, which is not supported: use {', '.join(_DTYPES)}")
    return {
        name: FileTensor(path, begin + entry["data_offsets"][0], tuple(entry["shape"]), _DTYPES[entry["dtype"]])
        for name, entry in entries.items()
    }


def _entries(path: Path) -> tuple[dict[str, Any], int]:
    """The header's entries and the file position from which their offsets count."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise HerdError(f"{path} is damaged or cut off: its header takes {length} bytes, the file has {size}; "
                            "download it again")
        text = file.read(length)
    try:
        entries = dict(json.loads(text).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise HerdError(f"{path} is damaged or cut off: its header is not a JSON object; "
                        "download it again") from error
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _check(path: Path, entries: dict[str, Any], begin: int) -> None:
    size = path.stat().st_size
    try:
        needed = begin + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if needed > size:
            raise HerdError(f"{path} is damaged or cut off: its header describes {needed} bytes, the file has {size}; "
                            "download it again")
        # The library checks the rest: offsets against shapes, gaps, overlaps. Under numpy it does not map the file
        # privately, which would need as much free memory as the file is long.
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError, KeyError, TypeError, IndexError) as error:
        raise HerdError(f"{path} is damaged or cut off ({error}): download it again") from error
