"""JSON of bundles as typed objects: exactly as their classes describe it, or an error that names the value."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from ...errors import HerdError

T = TypeVar("T")


def decode(what: str, raw: object, kind: type[T]) -> T:
    """Convert parsed JSON to a class, without guessing: no text becomes a number, no value may be missing or unknown.

    Args:
        what: name of the value, for the message.
        raw: what ``json.loads`` gave; objects that are converted already are taken as they are.
        kind: a class that msgspec knows.

    Raises:
        HerdError: names the path of the value that is missing, unknown or of another kind.
    """
    try:
        return msgspec.convert(raw, kind, strict=True)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).replace("`", "").partition(" - at $")
        raise HerdError(f"{what}{path}: {_sentence(reason)}: rebuild the bundle") from error


def decode_values(what: str, raw: object, kind: type[T]) -> dict[str, T]:
    """Convert every value of a JSON object, so that a message names the key."""
    values = decode(what, raw, dict[str, Any])
    return {name: decode(f"{what}[{name!r}]", value, kind) for name, value in values.items()}


def _sentence(reason: str) -> str:
    """Msgspec's words, beginning as the middle of a sentence does."""
    return reason[:1].lower() + reason[1:]
