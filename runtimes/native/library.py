"""The compiled operators: where they lie, and which instruction set they use here."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from ...errors import HerdError

_ADVICE = "compile it again with python -m herdgraph.runtimes.native.compile"


def library_path() -> Path | None:
    """The library for ``SessionOptions.register_custom_ops_library``; None where it is not built.

    Raises:
        HerdError: the library is there and cannot be loaded, or is another version's.
    """
    # Late, because `python -m` of that module would find it imported and warn.
    from .compile import INTERFACE, built_library  # noqa: PLC0415

    path = built_library()
    if not path or not path.exists():
        return None
    _check(path, INTERFACE)
    return path


def unit() -> str | None:
    """The instruction set that the operators use on this processor, for example ``avx2``; None without a library.

    The environment variable ``HERDGRAPH_UNIT`` asks for another one when the library is loaded first; a unit that
    this processor cannot run gives way to the plainest one.

    Raises:
        HerdError: as ``library_path``.
    """
    path = library_path()
    if not path:
        return None
    name = ctypes.CDLL(str(path)).herdgraph_unit
    name.restype = ctypes.c_char_p
    return str(name().decode())


@cache
def _check(path: Path, wanted: int) -> None:
    """Compare a library's interface: graphs of another one would fail in the runtime, which cannot say why."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise HerdError(f"{path} cannot be loaded ({error}): {_ADVICE}") from error
    found = int(library.herdgraph_interface()) if hasattr(library, "herdgraph_interface") else 0
    if found != wanted:
        raise HerdError(f"{path} has version {found} of the operators, this herdgraph needs {wanted}: {_ADVICE}")
