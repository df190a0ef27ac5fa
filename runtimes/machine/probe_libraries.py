"""Loads shared libraries and prints where they were found, a JSON document. Run by ``probe.py``.

    python probe_libraries.py libcudart.so.13 libcublasLt.so.13 ...

They are looked for as onnxruntime's ``preload_dlls`` does: in the ``nvidia`` packages of pip, then where the system's
loader looks. Names that need one another come in the order in which they are loaded.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path


def find(name: str) -> str | None:
    """Where a library of a pip package lies."""
    found = (path for entry in sys.path for path in Path(entry).glob(f"nvidia/*/lib/{name}"))
    return next(map(str, found), None)


def load(name: str) -> dict[str, str | None]:
    """Load a library; where it is, and why it cannot be loaded."""
    path = find(name)
    try:
        ctypes.CDLL(path or name, mode=getattr(ctypes, "RTLD_GLOBAL", 0))
    except OSError as error:
        return {"path": path, "problem": str(error)}
    return {"path": path or "the system's", "problem": None}


if __name__ == "__main__":
    print(json.dumps({name: load(name) for name in sys.argv[1:]}))
