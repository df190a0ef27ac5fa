"""Typed access to the metadata of a GGUF file, which may hold anything under any key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from ...errors import HerdError

Value = TypeVar("Value")

_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
}


def field(metadata: Mapping[str, Any], key: str, kind: type[Value]) -> Value | None:
    """A value of the metadata, None when there is none.

    Args:
        metadata: by key.
        key: as GGUF calls it.
        kind: ``int``, ``float``, ``bool``, ``str``, ``list[str]`` or ``list[int]``.

    Raises:
        HerdError: it is of another kind, or not finite.
    """
    if key not in metadata:
        return None
    try:
        found = msgspec.convert(metadata[key], kind)
    except msgspec.ValidationError as error:
        raise _refusal(metadata, key, kind) from error
    if isinstance(found, float) and not math.isfinite(found):
        raise _refusal(metadata, key, kind)
    return found


def required(metadata: Mapping[str, Any], key: str, kind: type[Value]) -> Value:
    """As ``field``, for what every file has.

    Raises:
        HerdError: it is missing, too.
    """
    if (found := field(metadata, key, kind)) is None:
        raise HerdError(f"the GGUF file has no metadata key {key}: is it a complete Llama file?")
    return found


def _refusal(metadata: Mapping[str, Any], key: str, kind: Any) -> HerdError:
    shown = repr(metadata[key])
    shown = shown if len(shown) < 60 else f"{shown[:60]}…"
    return HerdError(f"the GGUF file's {key} is {shown}, {_WORDS[kind]} is needed: get the file again")
