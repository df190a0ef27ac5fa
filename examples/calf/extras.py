"""Packages that only the making of a calf needs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from herdgraph.errors import HerdError


def needed(module: str) -> Any:
    """A module of the extra ``calf``.

    Raises:
        HerdError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise HerdError(f"{module} is needed to make a calf: pip install -e '.[calf]'") from error
