"""The key that a server wants: from a file or the environment, since other users see command lines."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import HerdError

_VARIABLES = ("HERDGRAPH_API_KEY", "OPENAI_API_KEY")
_BYTES = 1 << 16


def api_key(file: Path | None) -> str | None:
    """The key, None where there is none.

    Args:
        file: that contains it, and nothing else; None for the environment.

    Raises:
        HerdError: the file cannot be read, or what it or the environment holds cannot be a key.
    """
    from ..reading import read_text

    if file is not None:
        return _checked(read_text(file, most=_BYTES), str(file))
    name = next((name for name in _VARIABLES if os.environ.get(name)), None)
    return _checked(os.environ[name], f"the environment variable {name}") if name else None


def _checked(text: str, where: str) -> str:
    """The key without the end of its line; it is not repeated in a message."""
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise HerdError(f"{where} holds no API key: it has to be one word, and nothing else")
    return key
