"""Writing safetensors files as every other file is written: with the umask's mode, and errors that are ``OSError``."""

from __future__ import annotations

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
