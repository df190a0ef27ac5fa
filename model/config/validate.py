"""Checks of configurations and of the JSON that they come from: msgspec compares the types, the ranges are ours.

Every refusal names the field, the value that was found and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import cache
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from ...errors import HerdError, shown

LARGEST = 1 << 40
"""Limit of every whole number: above anything real, below what overflows."""
MOST_LAYERS = 10_000

Section = TypeVar("Section", bound=msgspec.Struct)

_WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null",
    list[int]: "a list of whole numbers", tuple[int, ...]: "a list of whole numbers", list[str]: "a list of texts",
    tuple[bool, ...]: "a list of true and false", list[bool | int]: "a list of true and false",
}


def require(condition: object, message: str) -> None:
    """Refuse a configuration unless a condition holds.

    Raises:
        HerdError: it does not.
    """
    if not condition:
        raise HerdError(f"impossible configuration: {message}")


def require_count(name: str, count: int, most: int = LARGEST) -> int:
    """A number of things, checked before anything is divided by it or made that often.

    Raises:
        HerdError: it is not within 1 and ``most``.
    """
    if not 1 <= count <= most:
        raise HerdError(f"{name} is {count}, it must be within 1 and {most}: correct it")
    return count


def check_fields(config: Any, *, positive: Collection[str] = ()) -> None:
    """Check every field of a configuration by its annotation, whatever file or program it came from.

    Args:
        config: a dataclass.
        positive: fields that must be above 0.

    Raises:
        HerdError: a value is of the wrong type, not finite, too large, or not above 0.
    """
    kind: type = type(config)
    for name, hint in _hints(kind).items():
        value = getattr(config, name)
        if problem := _problem(value, hint, positive=name in positive):
            require(False, f"{name} is {shown(value)}, {problem}")


def _problem(value: Any, hint: Any, *, positive: bool) -> str:
    if not _has_type(value, hint):
        return f"{_words(hint)} is needed"
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            return "a finite number is needed"
        if isinstance(number, int) and abs(number) > LARGEST:
            return f"at most {LARGEST} is possible"
    return "it must be above 0" if positive and value <= 0 else ""


def exact_fields(kind: type, raw: object) -> dict[str, Any]:
    """The fields of a dataclass in a JSON object that this project wrote, lists as tuples; their types are not checked.

    Raises:
        HerdError: not an object, or a field is unknown or missing, even one that has a default.
    """
    require(isinstance(raw, Mapping), f"{kind.__name__} is {shown(raw)}, a JSON object is needed")
    assert isinstance(raw, Mapping)
    for name in sorted({field.name for field in fields(kind)} ^ raw.keys()):
        require(False, f"{kind.__name__} has {'an unknown' if name in raw else 'no'} field {name!r}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}


def read_section(raw: Mapping[str, Any], kind: type[Section], place: str = "") -> Section:
    """An object of a published file, in which unknown fields are normal and null stands for the default.

    Args:
        raw: the object as JSON gives it.
        kind: the fields that matter, with their types and defaults.
        place: what the object is called in its file, in front of a field's name; empty for the file itself.

    Raises:
        HerdError: a field is missing, of the wrong type, or not finite.
    """
    hints, prefix = _hints(kind), f"{place}." if place else ""
    given = {name: _with_integers(raw[name]) for name in hints if raw.get(name) is not None}
    for name, value in given.items():
        if not _has_type(value, hints[name]):
            raise HerdError(f"{prefix}{name} is {shown(raw[name])}, {_words(hints[name])} is needed: correct it")
        if isinstance(value, float) and not math.isfinite(value):
            raise HerdError(f"{prefix}{name} is {value}, a finite number is needed: correct it")
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        missing = str(error).split("`")[1]
        where = f" in {place}" if place else ""
        raise HerdError(f"there is no value for {missing!r}{where}: the file is incomplete") from error


def square_side(name: str, value: int | list[int] | dict[str, int]) -> int:
    """One side of a square given as a number, a pair or Meta's ``{"height": h, "width": w}``.

    Raises:
        HerdError: no number, or two different ones.
    """
    sides = [value] if isinstance(value, int) else list(value.values() if isinstance(value, dict) else value)
    if len(set(sides)) != 1:
        raise HerdError(f"{name} is {value!r}, a square is needed: correct it")
    return sides[0]


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _has_type(value: object, hint: Any) -> bool:
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError:
        return False
    return True


def _with_integers(value: Any) -> Any:
    """JSON has one type of number: 8192.0 is as good as 8192, alone, in a list or in an object."""
    if isinstance(value, list):
        return [_integer(item) for item in value]
    if isinstance(value, dict):
        return {name: _integer(item) for name, item in value.items()}
    return _integer(value)


def _integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _words(hint: Any) -> str:
    """What a type is called in a message."""
    if hint in _WORDS:
        return _WORDS[hint]
    if get_origin(hint) is None or get_origin(hint) is dict:
        return "a JSON object"
    return " or ".join(_words(item) for item in get_args(hint))
