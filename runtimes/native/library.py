"""The compiled operators: where they lie, and which instruction set they use here."""

from __future__ import annotations

import ctypes
from pathlib import Path

from ...errors import HerdError
from .compile import built_library


def library_path() -> Path | None:
    """The library for ``SessionOptions.register_custom_ops_library``; None where it is not built."""
    path = built_library()
    return path if path and path.exists() else None


def unit() -> str | None:
    """The instruction set that the operators use on this processor, for example ``avx2``; None without a library.

    The environment variable ``HERDGRAPH_UNIT`` asks for another one when the library is loaded first; a unit that
    this processor cannot run gives way to the plainest one.

    Raises:
        HerdError: the library is there and cannot be loaded.
    """
    path = library_path()
    if not path:
        return None
    try:
        name = ctypes.CDLL(str(path)).herdgraph_unit
    except (OSError, AttributeError) as error:
        raise HerdError(f"{path} cannot be loaded ({error}): compile it again with"
                        " python -m herdgraph.runtimes.native.compile") from error
    name.restype = ctypes.c_char_p
    return name().decode()
