"""Answers taken apart into text and calls: both formats, cut anywhere, and the mistakes of other parsers."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from herdgraph.errors import HerdError
from herdgraph.runtimes.server.tools import (
    CallArguments,
    CallStart,
    Format,
    Part,
    TextPart,
    ToolParser,
    checked_tools,
    joined,
)
from herdgraph.runtimes.server.tools.written_calls import written_calls

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "get_weather", "get", "search.web-2")]


def parts(text: str, format: Format = "pythonic", cut: int | None = None) -> list[Part]:  # noqa: A002
    parser = ToolParser(TOOLS, (format,))
    pieces = [text] if cut is None else [text[:cut], text[cut:]]
    return joined([part for piece in pieces for part in parser.feed(piece)] + parser.finish())


def summary(found: list[Part]) -> list[Any]:
    """Text as strings, calls as (name, arguments); arguments that are no JSON stay text."""
    out: list[Any] = []
    for part in found:
        if isinstance(part, TextPart):
            out.append(part.text)
        elif isinstance(part, CallStart):
            assert part.index == sum(isinstance(item, tuple) for item in out)
            out.append((part.name, ""))
        else:
            out[-1] = (out[-1][0], loaded(part.fragment))
    return out


def loaded(fragment: str) -> Any:
    try:
        return json.loads(fragment, parse_constant=lambda name: pytest.fail(f"{name} in {fragment}"))
    except json.JSONDecodeError:
        return fragment


PYTHONIC: list[tuple[str, list[Any]]] = [
    ('[f(a="x", b=2), get_weather()]', [("f", {"a": "x", "b": 2}), ("get_weather", {})]),
    ('<|python_start|>[f()]<|python_end|>', [("f", {})]),
    ('<|python_start|>\n[f()]<|python_end|>\n', [("f", {})]),
    ('Let me see.\n[get(x=1)]', ["Let me see.\n", ("get", {"x": 1})]),
    ("[1] According to [2], f(x) is [f] or [get_weather].", ["[1] According to [2], f(x) is [f] or [get_weather]."]),
    ("[unknown(a=1)]", ["[unknown(a=1)]"]),
    ("[ f( a = 1 , b = [ 1 , 2 , ] , ) ]", [("f", {"a": 1, "b": [1, 2]})]),
    ("[search.web-2(q='it\\'s \"so\"')]", [("search.web-2", {"q": 'it\'s "so"'})]),
    ("[f(a=-1, b=+2.50, c=1_000, d=0x1F, e=.5, g=1e3, h=-0.0)]",
     [("f", {"a": -1, "b": 2.5, "c": 1000, "d": 31, "e": 0.5, "g": 1000.0, "h": -0.0})]),
    ("[f(a=true, b=True, c=null, d=None, e=False, g=false)]",
     [("f", {"a": True, "b": True, "c": None, "d": None, "e": False, "g": False})]),
    ('[f(a="two\nlines\tand \\n, \\u00e9, \\ud83d\\ude00, \\x41, \\U0001F600, \\d+, \\/")]',
     [("f", {"a": "two\nlines\tand \n, é, 😀, A, 😀, \\d+, /"})]),
    ('[f(a="\\ud83d", b="\\udc00x", c="\\ud83d\\u0041")]', [("f", {"a": "�", "b": "�x", "c": "�A"})]),
    ('[f(a={"k": [True, {"n": None}], \'s\': {}}, b=[])]',
     [("f", {"a": {"k": [True, {"n": None}], "s": {}}, "b": []})]),
    ('[f(**{"a b": 1, "c": "]"})]', [("f", {"a b": 1, "c": "]"})]),
    ('[f(code="[get(x=1)]")]', [("f", {"code": "[get(x=1)]"})]),
    ("[f()] and [get()]", [("f", {}), "and ", ("get", {})]),
    ("[get", ["[get"]),
    ("<|python_start|>print(1)<|python_end|>", ["<|python_start|>print(1)<|python_end|>"]),
    ("", []),
    # What goes wrong within a call leaves no arguments that could be taken for an object.
    ("[f(x=1e999)]", [("f", '{"x": '), ")]"]),
    ("[f(x=nan)]", [("f", '{"x": '), ")]"]),
    ("[f(x=open('/etc/passwd'))]", [("f", '{"x": '), "('/etc/passwd'))]"]),
    ('[f("x")]', [("f", "{"), '"x")]']),
    ("[f(a=1, a=2)]", [("f", '{"a": 1, '), "=2)]"]),
    ("[f(a=1), unknown(b=2)]", [("f", {"a": 1}), ", unknown(b=2)]"]),
    ('[f(a="cut', [("f", '{"a": "cut')]),
    ("[f(", [("f", "{")]),
]
JSON: list[tuple[str, list[Any]]] = [
    ('{"type": "function", "name": "f", "parameters": {"a": "x"}}', [("f", {"a": "x"})]),
    ('{"name":"f","arguments":{}}', [("f", {})]),
    ('<|python_start|>{"name": "f", "parameters": {}}; {"name": "get", "parameters": {"b": [1]}}<|python_end|>',
     [("f", {}), ("get", {"b": [1]})]),
    ('{"name": "f", "parameters": {}}\n{"name": "get", "parameters": {}}', [("f", {}), ("get", {})]),
    ('Sure: {"name": "f", "parameters": {"s": "}}; {"}}\nDone.', ["Sure: ", ("f", {"s": "}}; {"}), "Done."]),
    ('{"name": "Alice", "age": 3}', ['{"name": "Alice", "age": 3}']),
    ('{"name": "f"}', ['{"name": "f"}']),
    ('{"name": "f", "parameters": [1]}', [("f", ""), "[1]}"]),
    ('{"name": "f", "parameters": {"x": 1e999}}', [("f", '{"x": '), "}}"]),
    ('{"name": "f", "parameters": {"x": 1}, "y": 2}', [("f", {"x": 1}), ', "y": 2}']),
]
CASES = [("pythonic", *case) for case in PYTHONIC] + [("json", *case) for case in JSON]


@pytest.mark.parametrize(("format", "text", "expected"), CASES, ids=[case[1] for case in CASES])
def test_answers_cut_anywhere(format: Format, text: str, expected: list[Any]) -> None:  # noqa: A002
    assert summary(parts(text, format)) == expected
    parser = ToolParser(TOOLS, (format,))
    assert summary(joined([part for piece in text for part in parser.feed(piece)] + parser.finish())) == expected
    for cut in range(len(text) + 1):
        assert summary(parts(text, format, cut)) == expected


@pytest.mark.parametrize(("text", "expected"), [
    *((text, found) for text, found in PYTHONIC + JSON),
    ('First [f(a=1)] then {"name": "get", "parameters": {}}', ["First ", ("f", {"a": 1}), "then ", ("get", {})]),
    ('[{"name": "f", "parameters": {}}]', ["[", ("f", {}), "]"]),
    ('{"name": [f()]', ['{"name": ', ("f", {})]),
    ('[f(), {"name": "get", "parameters": {}}]', [("f", {}), ", ", ("get", {}), "]"]),
], ids=str)
def test_both_forms_are_read_in_one_answer(text: str, expected: list[Any]) -> None:
    for pieces in ([text], list(text)):
        parser = ToolParser(TOOLS)
        assert summary(joined([part for piece in pieces for part in parser.feed(piece)] + parser.finish())) == expected


@pytest.mark.parametrize(("format", "text", "calls"), [
    ("pythonic", "[f(), get_weather(a=1)]", [("f", {}), ("get_weather", {"a": 1})]),
    ("json", '{"name": "f", "parameters": {}}; {"type": "function", "name": "get_weather", "parameters": {"a": 1}}',
     [("f", {}), ("get_weather", {"a": 1})]),
    ("json", '{"name": "f", "parameters": {}}\n{"name": "get", "arguments": {}}', [("f", {}), ("get", {})]),
])
def test_what_was_begun_of_the_next_call_is_no_text(
    format: Format, text: str, calls: list[Any]  # noqa: A002
) -> None:
    first = text.index("f()") + 3 if format == "pythonic" else text.index("{}}") + 3
    for end in range(first, len(text)):
        for whole in (True, False):
            parser = ToolParser(TOOLS, (format,))
            pieces = [text[:end]] if whole else text[:end]
            found = summary(joined([part for piece in pieces for part in parser.feed(piece)] + parser.finish()))
            assert found[0] == calls[0]
            assert [item[0] for item in found[1:]] in ([], [calls[1][0]])


def test_arguments_stream_while_they_are_written() -> None:
    parser = ToolParser(TOOLS, ("pythonic",))
    assert parser.feed("Well [ge") == [TextPart("Well ")]
    assert parser.feed("t_weather") == []
    start, arguments = parser.feed('(city="San Fr')
    assert isinstance(start, CallStart)
    assert (start.index, start.name) == (0, "get_weather")
    assert start.id.startswith("call_")
    assert arguments == CallArguments(0, '{"city": "San Fr')
    assert parser.feed('ancisco", days=1') == [CallArguments(0, 'ancisco", "days": ')]
    assert parser.feed("2)") == [CallArguments(0, "12}")]
    assert parser.feed("]") == []
    assert parser.finish() == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(['"', "\\", "]", ")", "'", "\u2028", "{"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6)
CALLS = st.lists(st.fixed_dictionaries({
    "name": st.sampled_from(["f", "get", "get_weather", "search.web-2"]),
    "arguments": st.dictionaries(st.sampled_from(["a", "b2", "_c", "a b", "größe"]) | st.text(max_size=3), VALUES,
                                 max_size=3)}), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(CALLS, st.sampled_from(["pythonic", "json"]), st.integers(0, 1 << 30))
def test_written_calls_are_read_back(calls: list[dict[str, Any]], format: Format, cut: int) -> None:  # noqa: A002
    text = written_calls(calls, format)
    expected = [(call["name"], call["arguments"]) for call in calls]
    assert summary(parts(text, format)) == expected
    assert summary(parts(text, format, cut % (len(text) + 1))) == expected


PIECES = st.sampled_from(["[", "]", "f", "(", ")", "get", '{"name": "f", "parameters": ', "{", "}", '"', "'", "a=", ",",
                          " ", "\\", "1", "-", "<|python_start|>", "<|python_end|>", "None", "\n", ";", "**", ":", "é"])


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=20).map("".join), st.sampled_from(["pythonic", "json"]), st.integers(0, 100))
@example("[f(a='", "pythonic", 3)
def test_no_text_is_lost_and_cuts_change_nothing(text: str, format: Format, cut: int) -> None:  # noqa: A002
    found = parts(text, format)
    assert summary(parts(text, format, min(cut, len(text)))) == summary(found)
    if not any(isinstance(part, CallStart) for part in found):
        assert "".join(part.text for part in found if isinstance(part, TextPart)) == text


@pytest.mark.parametrize("text", ["[" * 60_000, "[f(a=[" + "1," * 30_000, '[f(a="' + "\\n" * 30_000, "[ get" * 12_000,
                                  '{"name": "' * 6_000, "<|python_start|>" * 4_000, "[f(a=" + "[" * 60_000])
def test_hostile_answers_take_linear_time(text: str) -> None:
    start = time.perf_counter()
    for format in ("pythonic", "json"):  # noqa: A001
        parser = ToolParser(TOOLS, (format,))
        for place in range(0, len(text), 7):
            parser.feed(text[place : place + 7])
        parser.finish()
    assert time.perf_counter() - start < 5


def test_bare_functions_are_tools_too() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    function = {"name": "f", "description": "d", "parameters": schema, "strict": True}
    wrapped = checked_tools([{"type": "function", "function": function}])
    assert checked_tools([function]) == checked_tools([{"type": "function", **function}]) == wrapped
    assert checked_tools(wrapped) == wrapped


@pytest.mark.parametrize(("tools", "reason"), [
    ([], "a list of functions is needed"), ("f", "a list of functions is needed"), ([5], "tool 0 is 5"),
    ([{"type": "retrieval"}], "tool 0 is"), ([{"type": "function", "function": {}}], "tool 0 is called None"),
    ([{"type": "function", "function": {"name": "a b"}}], "is called 'a b': a name has 1 to 64"),
    ([{"type": "function", "function": {"name": "<|eot|>"}}], "a name has 1 to 64"),
    ([{"type": "function", "function": {"name": "x" * 65}}], "a name has 1 to 64"),
    ([{"type": "function", "function": {"name": "größe"}}], "a name has 1 to 64"),
    ([*TOOLS, TOOLS[0]], "two tools are called 'f'"), (TOOLS * 40, "160 tools, at most 128"),
    ([{"function": {"name": "f", "parameters": {"type": "array"}}}], "arguments are an object"),
    ([{"function": {"name": "f", "parameters": 5}}], "the parameters of f is 5"),
    ([{"function": {"name": "f", "description": 5}}], "a text is needed"),
    ([{"function": {"name": "f", "description": "x" * 300_000}}], "at most 262144"),
])
def test_tools_that_are_refused(tools: Any, reason: str) -> None:
    with pytest.raises(HerdError, match=reason):
        ToolParser(tools)
