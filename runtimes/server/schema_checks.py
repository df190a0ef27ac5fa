"""What of a JSON schema is refused before the library sees it: what it would not enforce, and sizes without end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import HerdError, shown
from ...model.processing.messages import plain_copy

MOST_BYTES = 256 << 10
"""Largest schema, regular expression or grammar."""
MOST_PROPERTIES = 1000
"""Properties of one object."""
_DEEPEST = 64

_NOT_ENFORCED = ("dependencies", "additionalItems", "divisibleBy", "disallow", "extends")
"""Keywords of older drafts that the library passes over in silence."""
_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")


def checked_schema(schema: Any, where: str = "the JSON schema") -> dict[str, Any]:
    """A schema as a plain dictionary.

    Args:
        schema: an object, or true for any value.
        where: it stands, for messages.

    Raises:
        HerdError: it is no schema, too large or too deep, or says what would not be enforced.
    """
    plain = plain_copy({} if schema is True else schema, where)
    if not isinstance(plain, dict):
        raise HerdError(f"{where} is {shown(schema)}, an object is needed")
    require_size(json.dumps(plain), where)
    for part in _subschemas(plain, where):
        if part.get("uniqueItems") is False:
            del part["uniqueItems"]  # says nothing, and the library knows no keyword of this name
        _require_enforceable(part, where)
    return plain


def require_size(text: str, where: str, most: int = MOST_BYTES) -> None:
    """Refuse what is too long to be compiled.

    Raises:
        HerdError: the text has more bytes.
    """
    if len(text.encode()) > most:
        raise HerdError(f"{where} has {len(text.encode())} bytes, at most {most} are taken: make it smaller")


def _subschemas(schema: dict[str, Any], where: str, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The schema itself and all schemas in it; values such as those of ``enum`` are none."""
    if depth == _DEEPEST:
        raise HerdError(f"{where} is nested more than {_DEEPEST} deep: make it flatter")
    yield schema
    below = [value for name in _OF_SCHEMAS if isinstance(schema.get(name), dict) for value in schema[name].values()]
    below += [value for name in _LISTS if isinstance(schema.get(name), list) for value in schema[name]]
    below += [schema[name] for name in _SINGLE if name in schema]
    for part in below:
        if isinstance(part, dict):
            yield from _subschemas(part, where, depth + 1)


def _require_enforceable(schema: Mapping[str, Any], where: str) -> None:
    for name in _NOT_ENFORCED:
        if name in schema:
            raise HerdError(f"{where} uses {name!r}, which cannot be enforced: leave it out")
    if isinstance(schema.get("items"), list):
        raise HerdError(f"{where} has a list as 'items', which draft 2020-12 calls 'prefixItems': rename it")
    if any(isinstance(schema.get(name), bool) for name in ("exclusiveMinimum", "exclusiveMaximum")):
        raise HerdError(f"{where} has a bound that is exclusive by true or false, as in draft 4: write its number")
    properties = schema.get("properties")
    if isinstance(properties, dict) and len(properties) > MOST_PROPERTIES:
        raise HerdError(f"{where} has an object of {len(properties)} properties, at most {MOST_PROPERTIES} are taken")
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    # Names of additional properties may repeat, so that counting them would prove nothing.
    if isinstance(least, (int, float)) and isinstance(required, list) and least > max(1, len(required)):
        raise HerdError(f"{where} asks for {least} properties and names {len(required)} as required: "
                        "name those that must be there, their number alone cannot be enforced")
