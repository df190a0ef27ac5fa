"""Writing safetensors files as every other file is written: with the umask's mode, and errors that are ``OSError``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Args:
        tensors: by name, each dense and in memory of its own.
        path: to create or to replace.
        metadata: for the header.

    Raises:
        OSError: it cannot be written, for instance on a full disk.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)  # the library renames a temporary file, which only its owner may read


def write_zeros(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of float32 zeros, whose places are filled in later; a hole in the file until then.

    Args:
        path: to create or to replace.
        shapes: of the tensors, by name.

    Raises:
        OSError: it cannot be written.
    """
    header, end = {}, 0
    for name in sorted(shapes):
        begin, end = end, end + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
