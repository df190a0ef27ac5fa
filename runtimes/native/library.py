"""Where the compiled operators lie."""

from __future__ import annotations

import os
from pathlib import Path


def library_path() -> Path | None:
    """The library, None where it was not built."""
    found = os.environ.get("HERD_TMP_LIB")
    return Path(found) if found else None
