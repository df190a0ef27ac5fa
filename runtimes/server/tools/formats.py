"""Grammars of calls: whatever a model writes under them is text, or calls that name a tool and fit its schema.

The grammars are in the Lark syntax of llguidance, with the schemas of arguments embedded as ``%json``. Arguments in
Python's form are JSON, too, but for ``True``, ``False`` and ``None``, which may stand where an argument's own schema
allows their JSON counterparts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ....errors import HerdError
from .definitions import Tool
from .openings import AFTER, BEFORE, MOST_BLANKS, Format

ToolChoice = str
"""``auto``, ``required``, or the name of a tool."""

MOST_CALLS = 64
"""Calls of one answer, so that a model that repeats itself comes to an end."""

_COMPACT = {"whitespace_flexible": False, "item_separator": ",\\x20?", "key_separator": ":\\x20?", "lenient": False,
            "coerce_one_of": False}
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DEFINITIONS = ("$defs", "definitions")
_PLAIN = frozenset(("type", "properties", "required", "additionalProperties", "description", "title", "$schema",
                    "$comment", "examples", "default", *_DEFINITIONS))
"""Keywords of an object whose properties can be written as keyword arguments, each by its own schema."""
_NUMBERS = {"integer": r"INTEGER: /-?(0|[1-9][0-9]{0,39})/",
            "number": r"NUMBER: /-?(0|[1-9][0-9]{0,39})(\.[0-9]{1,40})?([eE][+-]?(1[0-9]{2}|[0-9]{1,2}))?/"}
"""Numbers that no client reads as infinite, and that end: the library's own may have any digits and exponent."""
_SAYING_NOTHING = frozenset(("type", "format", "description", "title", "default", "examples", "$comment"))
"""Keywords beside which a number may be any."""
_LITERALS = {"boolean": ("True", "False"), "null": ("None",)}


def call_grammar(tools: Sequence[Tool], choice: ToolChoice, parallel: bool, formats: Sequence[Format]) -> str:
    """The grammar of an answer to which tools were offered.

    Args:
        tools: checked ones.
        choice: ``auto`` for text or calls, ``required`` for calls, or the name of the one tool to call.
        parallel: whether there may be several calls; a tool that is named is called once.
        formats: how calls may be written under ``auto``, where the model decides; all others are written in the first.

    Raises:
        HerdError: ``choice`` names no tool.
    """
    any_tool = choice in ("auto", "required")
    named = [tool for tool in tools if tool.name == choice and not any_tool]
    if not any_tool and not named:
        known = ", ".join(tool.name for tool in tools)[:200]
        raise HerdError(f"tool_choice names {choice!r:.80}, which is not among the tools: {known}")
    tools, most = named or tools, MOST_CALLS if parallel and not named else 1
    formats = formats if choice == "auto" else formats[:1]
    if choice == "auto":
        heads = ("TEXT: /(?s:.+)/", *_heads(tools, formats, "(?s:.*)"))
        return _grammar("TEXT? | TEXT? marked | opened", heads, tools, most, formats)
    return _grammar("calls | marked", (), tools, most, formats)


def calls_alone_grammar(tools: Sequence[Tool], parallel: bool, formats: Sequence[Format]) -> str:
    """The grammar of calls in any of some formats with no text before them.

    Args:
        tools: checked ones.
        parallel: whether there may be several calls.
        formats: how calls may be written.
    """
    heads = _heads(tools, formats, "")
    return _grammar("opened | marked", heads, tools, MOST_CALLS if parallel else 1, formats)


def no_calls_grammar(tools: Sequence[Tool], formats: Sequence[Format]) -> str:
    """The grammar of every text that does not begin as an answer of ``calls_alone_grammar`` does."""
    openings = "|".join(_OPENINGS[form](re.escape(tool.name)) for form in formats for tool in tools)
    return f"start: TEXT\nTEXT: /(?s:.*)/ & ~/(?s:({openings}).*)/"


def _grammar(
    start: str, heads: Iterable[str], tools: Sequence[Tool], most: int, formats: Sequence[Format]
) -> str:
    rules = [rule for form in formats for rule in _RULES[form](tools, most)]
    calls = " | ".join(f"{form}_calls" for form in formats)
    return "\n".join((f"start: {start}", f"marked: {BEFORE} calls {AFTER}?", f"calls: {calls}", *heads, *rules))


def with_markers(grammar: str, before: int | None, after: int | None) -> str:
    """The grammar for a vocabulary, which may lack the tokens around calls."""
    if before is None or after is None:
        lines = [line for line in grammar.split("\n") if not line.startswith("marked:")]
        return "\n".join((lines[0].replace(" | TEXT? marked", "").replace(" | marked", ""), *lines[1:]))
    return grammar.replace(f"marked: {BEFORE} calls {AFTER}?", f"marked: <[{before}]> calls <[{after}]>?", 1)


def _heads(tools: Sequence[Tool], formats: Sequence[Format], before: str) -> Iterator[str]:
    """Text that ``before`` matches up to where a call begins; what follows is then the rest of this call."""
    yield "opened: " + " | ".join(f"{form}_head{index} {form}_rest{index} {form}_more"
                                  for form in formats for index in range(len(tools)))
    for form in formats:
        for index, tool in enumerate(tools):
            yield f"{form}_head{index}[lazy]: /{before}{_OPENINGS[form](re.escape(tool.name))}/"


def _pythonic(tools: Sequence[Tool], most: int) -> Iterator[str]:
    yield 'pythonic_calls: "[" pythonic_call pythonic_more\nCOMMA: /,[ ]?/'
    yield from _NUMBERS.values()
    yield f'pythonic_more: {_repeated("COMMA pythonic_call", most - 1)} "]"'
    yield "pythonic_call: " + " | ".join(f'"{tool.name}(" pythonic_rest{index}' for index, tool in enumerate(tools))
    for index, tool in enumerate(tools):
        yield f'pythonic_rest{index}: arguments{index} ")"'
        yield from _arguments(index, tool.parameters)


def _json(tools: Sequence[Tool], most: int) -> Iterator[str]:
    yield "json_calls: json_call json_more\nSEPARATOR: /[ ]?;[ ]?|\\n/"
    yield f"json_more: {_repeated('SEPARATOR json_call', most - 1)}"
    yield "json_call: " + " | ".join(f"JSON{index} json_rest{index}" for index in range(len(tools)))
    for index, tool in enumerate(tools):
        yield f"JSON{index}: /{_json_opening(re.escape(tool.name))}/"
        yield f'json_rest{index}: /[ ]?/ {_embedded(tool.parameters)} "}}"'


def _repeated(rule: str, most: int) -> str:
    return f"({rule}){{0,{most}}}" if most else '""'


def _pythonic_opening(name: str) -> str:
    return rf"\[[ \n]{{0,{MOST_BLANKS}}}{name}\("


def _json_opening(name: str) -> str:
    blank = r"[ \n]?"
    return (rf'\{{{blank}("type":{blank}"function",{blank})?"name":{blank}"{name}",{blank}'
            r'"(parameters|arguments)":')


_RULES: Mapping[Format, Callable[[Sequence[Tool], int], Iterator[str]]] = {"pythonic": _pythonic, "json": _json}
_OPENINGS: Mapping[Format, Callable[[str], str]] = {"pythonic": _pythonic_opening, "json": _json_opening}


def _arguments(index: int, schema: dict[str, Any]) -> Iterator[str]:
    """Rules for what stands between the brackets of a call."""
    if not _has_keywords(schema):
        yield f'arguments{index}: "**" {_embedded(schema)}'
        return
    properties, required = schema.get("properties", {}), schema.get("required", [])
    yield f"arguments{index}: first{index}_0"
    for number, (name, value) in enumerate(properties.items()):
        this, after = f"value{index}_{number}", f"after{index}_{number + 1}"
        optional = name not in required
        skipped = f" | first{index}_{number + 1}" if optional else ""
        yield f'first{index}_{number}: "{name}=" {this} {after}{skipped}'
        present = f'COMMA "{name}=" {this}'
        yield f"after{index}_{number}: " + (f"({present})? {after}" if optional else f"{present} {after}")
        yield f"{this}: {' | '.join(_values(value, schema))}"
    yield f'first{index}_{len(properties)}: ""\nafter{index}_{len(properties)}: ""'


def _has_keywords(schema: Mapping[str, Any]) -> bool:
    """Whether a call can be written with keyword arguments."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not (_PLAIN.issuperset(schema) and isinstance(properties, dict) and isinstance(required, list)):
        return False
    named = all(_IDENTIFIER.fullmatch(name) and isinstance(value, dict) for name, value in properties.items())
    references = list(_references(schema))
    defined = all(isinstance(found, str) and found.startswith(("#/$defs/", "#/definitions/")) for found in references)
    return named and defined and set(map(str, required)) <= set(properties)


def _references(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "$ref":
                yield inner
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _with_definitions(value: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """An argument's schema by itself, with what it may refer to."""
    return {**value, **{name: schema[name] for name in _DEFINITIONS if name in schema}}


def _values(value: dict[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    """What an argument may be by its own schema, which is part of another one."""
    yield from _python_literals(value)
    types = value.get("type")
    kinds = types if isinstance(types, list) else [types]
    numbers = [kind for kind in kinds if kind in _NUMBERS] if _SAYING_NOTHING.issuperset(value) else []
    yield from (kind.upper() for kind in numbers)
    if rest := [kind for kind in kinds if kind not in numbers]:
        yield _embedded(_with_definitions({**value, "type": rest} if numbers else value, schema))


def _python_literals(schema: Mapping[str, Any]) -> Iterator[str]:
    """The constants of Python that an argument may be."""
    if "enum" in schema or "const" in schema or not {"allOf", "anyOf", "oneOf", "$ref"}.isdisjoint(schema):
        return
    types = schema.get("type", ["boolean", "null"])
    for kind in types if isinstance(types, list) else [types]:
        yield from (f'"{literal}"' for literal in _LITERALS.get(str(kind), ()))


def _embedded(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _COMPACT})}"
