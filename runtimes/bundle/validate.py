"""JSON objects of bundles, taken exactly as they are described or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import HerdError

_KINDS = {str: "a text", int: "a whole number", dict: "an object", list: "a list"}


def strict(what: str, raw: object, kinds: Mapping[str, type]) -> dict[str, Any]:
    """A JSON object with exactly these values, of these kinds.

    Raises:
        HerdError: names the value that is missing, unknown or of another kind.
    """
    if not isinstance(raw, dict):
        raise HerdError(f"{what} is {_shown(raw)}, an object is needed: rebuild the bundle")
    for name in sorted(raw.keys() ^ kinds.keys()):
        raise HerdError(f"{what} has {'an unknown' if name in raw else 'no'} value {name!r}: rebuild the bundle")
    for name, kind in kinds.items():
        if type(raw[name]) is not kind:
            raise HerdError(f"{what} has {_shown(raw[name])} as {name!r}, {_KINDS[kind]} is needed: rebuild the bundle")
    return raw


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:40]}…"
