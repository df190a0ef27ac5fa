"""What a template may do that can make much of little: each measures its result before it makes it.

Joining, repeating, replacing, formatting and indenting are rewritten here; what else a template calls makes no more
than it is given, and is accounted for afterwards (``budget.charging``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import jinja2
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.runtime import Context

from .budget import TemplateCostError, budget, require_bits

_CONVERSION = re.compile(r"%(?:\(\w*\))?[-+ 0#]{0,5}\d{0,3}(?:\.\d{0,3})?[sdifFeEgGxXorc%]")
_WIDEST_CONVERSION = 2000
_WIDEST_INDENT = 64


def tick(size: int) -> bool:
    """Account for a step of the template and ``size`` characters of its own text; true, so that ``and`` goes on."""
    budget().spend(size)
    return True


def charged(value: Any) -> Any:
    """Account for a value that the template made; returns the value."""
    return budget().charged(value)


def as_text(value: Any) -> str:
    """A value as text; a list is measured before all of it is written."""
    return value if isinstance(value, str) else str(budget().charged(str(budget().charged(value))))


@jinja2.pass_context  # so that constants are not printed, and left out of the budget, when the template is compiled
def printed(context: Context, value: Any) -> str:
    """What ``{{ value }}`` writes."""
    text = as_text(value)
    budget().spend(len(text))
    return text


def concatenated(*values: Any) -> str:
    """What ``a ~ b ~ c`` makes."""
    return joined("", values)


def joined(separator: str, values: Iterable[Any]) -> str:
    """The values as texts, with the separator between them."""
    texts = [as_text(value) for value in values]
    budget().spend_text(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


@jinja2.pass_environment
def join_filter(
    environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    """The filter ``join``, its parameters named as jinja2 names them."""
    return joined(as_text(d), value if attribute is None else map(make_attrgetter(environment, attribute), value))


def replaced(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    """The filter and the method ``replace``."""
    text, before, after = as_text(s), as_text(old), as_text(new)
    budget().spend_text(len(text) + text.count(before) * len(after))
    return text.replace(before, after, -1 if count is None else count)


def indented(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """The filter ``indent``."""
    text, step = as_text(s), width if isinstance(width, str) else width * " " if width <= _WIDEST_INDENT else None
    if step is None:
        raise TemplateCostError(f"it indents by {width}, at most {_WIDEST_INDENT} are allowed")
    budget().spend_text(len(text) + (len(text.splitlines()) + 1) * len(step))
    return str(FILTERS["indent"](text, step, first, blank))


def formatted(value: Any, *args: Any, **options: Any) -> str:
    """The filter ``format``."""
    return percent(as_text(value), options or args)


def percent(pattern: str, values: Any) -> str:
    """Old-style formatting, whose fields may not be wider than 999."""
    rest, fields = _CONVERSION.subn("", pattern)
    if "%" in rest:
        raise TemplateCostError(f"it formats by {pattern[:80]!r}, whose fields must be simple and narrow")
    given = values.values() if isinstance(values, dict) else values if isinstance(values, tuple) else (values,)
    widest = max((len(as_text(value)) for value in given), default=0)
    budget().spend_text(len(pattern) + fields * (widest + _WIDEST_CONVERSION))
    return pattern % values


def check_sum(left: Any, right: Any) -> None:
    """Account for ``left + right`` before it is made."""
    if isinstance(left, str) and isinstance(right, str):
        budget().spend_text(len(left) + len(right))
    elif isinstance(left, (list, tuple)):
        budget().spend(8 * len(left))  # what it refers to was counted when it was made
        budget().charged(right)


def check_product(left: Any, right: Any) -> None:
    """Account for ``left * right`` before it is made."""
    if isinstance(left, int) and isinstance(right, int):
        return require_bits(left.bit_length() + right.bit_length())
    many, times = (left, right) if isinstance(right, int) else (right, left)
    if isinstance(many, str) and isinstance(times, int):
        budget().spend_text(len(many) * max(times, 0))
    elif isinstance(many, (list, tuple)) and isinstance(times, int):
        budget().spend_copies(many, max(times, 0))
    return None


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """``json.dumps`` without HTML escapes, as transformers' templates expect."""
    if indent is not None and not 0 <= indent <= _WIDEST_INDENT:
        raise TemplateCostError(f"it indents by {indent}, at most {_WIDEST_INDENT} are allowed")
    if separators is not None and sum(map(len, separators)) > _WIDEST_INDENT:
        raise TemplateCostError("its JSON has long separators")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces = []
    for piece in encoder.iterencode(budget().charged(value)):
        budget().spend(len(piece))
        pieces.append(piece)
    return "".join(pieces)
