"""Grammars of calls: every answer that they allow is text, or calls that the parser reads and the schemas take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from herdgraph.errors import HerdError
from herdgraph.model.processing import Tokenizer, load_tokenizer
from herdgraph.runtimes.server.structured import Grammars, GrammarSpec
from herdgraph.runtimes.server.tools import CallArguments, CallStart, Format, Part, TextPart, ToolParser, joined
from herdgraph.runtimes.server.tools.openings import FORMATS
from support import herds
from support.random_model import RandomModel
from support.schemas import SchemaGenerator

CALF = Path(__file__).parents[3] / "examples" / "calf" / "checkpoint"


def tool(name: str, properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": properties, "required": list(required), **more}}}


TOOLS = [
    tool("get_weather",
         {"city": {"type": "string"}, "days": {"type": "integer"}, "metric": {"type": "boolean"}}, "city"),
    tool("f", {}), tool("odd-one", {"a b": {"type": "integer"}}, "a b"),
    tool("tree", {"root": {"$ref": "#/$defs/node"}, "note": {"type": ["string", "null"]}}, "root", **{"$defs": {
        "node": {"type": "object", "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
                 "required": ["value"], "additionalProperties": False}}}),
]
SCHEMAS = {entry["function"]["name"]: entry["function"]["parameters"] for entry in TOOLS}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(CALF)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)


def accepts(grammars: Grammars, tokenizer: Tokenizer, spec: GrammarSpec, text: str) -> bool:
    """Whether a text, special tokens in it, is a whole answer."""
    constraint = grammars.compile(spec)
    for token in [*tokenizer.encode(text, allow_special=True), max(tokenizer.stop_ids)]:
        logits_V = np.zeros(tokenizer.vocab_size, np.float32)
        constraint.apply(logits_V)
        if not np.isfinite(logits_V[token]):
            return False
        constraint.accept(token)
    return True


def parsed(text: str, formats: Sequence[Format] = FORMATS, tools: list[Any] = TOOLS) -> list[Part]:
    parser = ToolParser(tools, formats)
    return joined([*parser.feed(text), *parser.finish()])


def require_valid_calls(found: list[Part], schemas: dict[str, Any]) -> int:
    """Every call's arguments fit its schema; the number of calls."""
    starts = [part for part in found if isinstance(part, CallStart)]
    arguments = {part.index: part.fragment for part in found if isinstance(part, CallArguments)}
    for start in starts:
        Draft202012Validator(schemas[start.name]).validate(json.loads(arguments[start.index]))
    return len(starts)


PYTHONIC_CALLS = [
    '[get_weather(city="Paris")]', '[get_weather(city="Paris", days=3, metric=True), f()]', "[f(),f()]",
    '[get_weather(city="a \\" b", metric=false)]', '[odd-one(**{"a b": 4})]', "<|python_start|>[f()]<|python_end|>",
    '[tree(root={"value": 1, "next": {"value": 2}}, note=None)]', "<|python_start|>[f()]",
]
JSON_CALLS = [
    '{"type": "function", "name": "f", "parameters": {}}', '{"name":"get_weather","arguments":{"city":"P","days":-1}}',
    '{"name": "f", "parameters": {}}; {"name": "odd-one", "parameters": {"a b": 1}}',
    '{"name": "f", "parameters": {}}\n{"name": "f", "parameters": {}}',
    '<|python_start|>{"name": "f", "parameters": {}}<|python_end|>',
]
TEXTS = ["", "Hello", "[1] According to [2], [f] is {\"name\": \"Alice\"}.", "[get_weather", '{"name": "f"', "日本"]
WRONG_PYTHONIC = [
    "[get_weather()]", "[get_weather(days=1)]", '[get_weather(city="P", days="x")]', '[get_weather(town="P")]',
    "[f(a=1)]", '[get_weather(city="P"', "[f()", "[f()] and more", "[f(), g()]", '[odd-one(a b=4)]', "Hm [f(]",
    "<|python_start|>print(1)<|python_end|>", "<|python_start|>",
]
WRONG_JSON = [
    '{"name": "get_weather", "parameters": {}}', '{"name": "f", "parameters": {"a": 1}',
    '{"name": "f", "parameters": 1}',
    '{"name": "f", "parameters": {}} and more', 'Hm {"name": "odd-one", "parameters": {"a b": "x"}}',
]


@pytest.mark.parametrize("format", ["pythonic", "json"])
def test_auto_is_text_or_calls(format: Format, grammars: Grammars, tokenizer: Tokenizer) -> None:  # noqa: A002
    auto = GrammarSpec.tools(TOOLS, "auto", True, (format,))
    calls, wrong = (PYTHONIC_CALLS, WRONG_PYTHONIC) if format == "pythonic" else (JSON_CALLS, WRONG_JSON)
    good = [*TEXTS, *calls, *(f"Let me see.\n\n{call}" for call in calls)]
    assert [text for text in good if not accepts(grammars, tokenizer, auto, text)] == []
    assert [text for text in wrong if accepts(grammars, tokenizer, auto, text)] == []


def test_auto_takes_both_forms_but_not_in_one_list(grammars: Grammars, tokenizer: Tokenizer) -> None:
    auto = GrammarSpec.tools(TOOLS, "auto", True, FORMATS)
    calls, wrong = [*PYTHONIC_CALLS, *JSON_CALLS], [*WRONG_PYTHONIC, *WRONG_JSON]
    wrong += ['[f()]; {"name": "f", "parameters": {}}', '{"name": "f", "parameters": {}}; f()']
    good = [*TEXTS, *calls, *(f"Let me see.\n\n{call}" for call in calls)]
    assert [text for text in good if not accepts(grammars, tokenizer, auto, text)] == []
    assert [text for text in wrong if accepts(grammars, tokenizer, auto, text)] == []
    required = GrammarSpec.tools(TOOLS, "required", True, ("json", "pythonic"))
    assert [text for text in PYTHONIC_CALLS if accepts(grammars, tokenizer, required, text)] == []


@pytest.mark.parametrize(("kind", "good", "bad"), [
    ("integer", ["0", "-12", "1" + "0" * 39], ["1" + "0" * 40, "1e5", "01"]),
    ("number", ["0.5", "-6.6e-11", "1E199", "9" * 40, "0." + "1" * 40], ["1e999", "1e200", "9" * 41, "0." + "1" * 41]),
    (["number", "string", "null"], ["1e10", '"a"', "None", "null"], ["1e999", "True"]),
], ids=str)
def test_numbers_of_arguments_are_finite(
    kind: Any, good: list[str], bad: list[str], grammars: Grammars, tokenizer: Tokenizer
) -> None:
    spec = GrammarSpec.tools([tool("f", {"x": {"type": kind, "description": "X"}}, "x")], "required", True, FORMATS)
    assert [text for text in good if not accepts(grammars, tokenizer, spec, f"[f(x={text})]")] == []
    assert [text for text in bad if accepts(grammars, tokenizer, spec, f"[f(x={text})]")] == []


@pytest.mark.parametrize("format", ["pythonic", "json"])
def test_required_and_named_tools_are_called_at_once(
    format: Format, grammars: Grammars, tokenizer: Tokenizer  # noqa: A002
) -> None:
    calls, wrong = (PYTHONIC_CALLS, WRONG_PYTHONIC) if format == "pythonic" else (JSON_CALLS, WRONG_JSON)
    required = GrammarSpec.tools(TOOLS, "required", True, (format,))
    single = GrammarSpec.tools(TOOLS, "required", False, (format,))
    named = GrammarSpec.tools(TOOLS, "f", True, (format,))
    assert [text for text in calls if not accepts(grammars, tokenizer, required, text)] == []
    assert [text for text in [*TEXTS, *wrong] if accepts(grammars, tokenizer, required, text)] == []
    for text in calls:
        names = [part.name for part in parsed(text, (format,)) if isinstance(part, CallStart)]
        assert accepts(grammars, tokenizer, single, text) == (len(names) == 1)
        assert accepts(grammars, tokenizer, named, text) == (names == ["f"])


def test_a_single_call_completes_the_answer(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.compile(GrammarSpec.tools(TOOLS, "f", False, ("pythonic",)))
    for token in tokenizer.encode("[f()]"):
        assert not constraint.is_complete
        constraint.accept(token)
    assert constraint.is_complete


@pytest.mark.parametrize("name", ["auto", "required"])
def test_a_tool_may_be_called_as_a_choice_is(name: str, grammars: Grammars, tokenizer: Tokenizer) -> None:
    tools = [tool(name, {}), tool("other", {})]
    assert accepts(grammars, tokenizer, GrammarSpec.tools(tools, "auto", True, ("pythonic",)), f"[{name}(), other()]")


@pytest.mark.parametrize(("tools", "choice", "reason"), [
    (TOOLS, "g", "tool_choice names 'g', which is not among the tools: get_weather, f"),
    ([tool("f", {"a": {"type": "array", "uniqueItems": True}})], "auto", "Unimplemented keys.*uniqueItems"),
    ([tool("f", {"a": {"$ref": "#/$defs/no"}})], "auto", "'/\\$defs/no' does not exist"),
    ([tool("f", {"a": {"type": "text"}})], "auto", "enforced: Invalid type: text"),
    ([tool("f", {"a": {"not": {}}}, **{"x-guidance": {"lenient": True}})], "auto", "Unimplemented keys"),
])
def test_refusals(tools: list[Any], choice: str, reason: str, grammars: Grammars) -> None:
    for format in ("pythonic", "json"):  # noqa: A001
        with pytest.raises(HerdError, match=reason):
            grammars.compile(GrammarSpec.tools(tools, choice, True, (format,)))


@pytest.mark.parametrize("format", ["pythonic", "json"])
@pytest.mark.parametrize("choice", ["auto", "required", "named"])
def test_random_calls_are_valid(
    format: Format, choice: str, grammars: Grammars, tokenizer: Tokenizer  # noqa: A002
) -> None:
    """Random tools, random logits; an answer to ``auto`` is led to the beginning of a call."""
    calls = 0
    for seed in range(12):
        tools = SchemaGenerator(seed, refused=0).tools()
        schemas = {entry["function"]["name"]: entry["function"]["parameters"] for entry in tools}
        name = list(schemas)[-1]
        formats = FORMATS if choice == "auto" else (format,)
        opening = f"[{name}(" if format == "pythonic" else f'{{"name": "{name}", "parameters":'
        spec = GrammarSpec.tools(tools, name if choice == "named" else choice, seed % 2 == 0, formats)
        begin = f"[1] So: {opening}" if choice == "auto" else ""
        answer = RandomModel(tokenizer, tokenizer.vocab_size, seed).answer(grammars.compile(spec), begin)
        if answer is None:
            continue
        found = parsed(answer, formats, tools)
        text = [part.text for part in found if isinstance(part, TextPart)]
        assert text == (["[1] So: "] if choice == "auto" else [])
        calls += require_valid_calls(found, schemas)
    assert calls > 8


PIECES = st.sampled_from([
    "[", "f(", ")", "]", "get_weather(", 'city="P"', ", ", "days=1", '{"name": "f", "parameters":', " {}", "}", "; ",
    "<|python_start|>", "<|python_end|>", "Hm ", "\n", '"', "[f()]", "tree(", "[ \n f(",
    '{"type":\n"function",\n"name":\n"f",\n"arguments":{}}'])


@settings(max_examples=80, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=8).map("".join),
       st.sampled_from([("pythonic",), ("json",), FORMATS]))
def test_what_the_parser_takes_for_a_call_the_grammar_made_one(
    grammars: Grammars, tokenizer: Tokenizer, text: str, formats: tuple[Format, ...]
) -> None:
    assume(accepts(grammars, tokenizer, GrammarSpec.tools(TOOLS, "auto", True, formats), text))
    shown = text.replace("<|python_start|>", "").replace("<|python_end|>", "")
    require_valid_calls(parsed(shown, formats), SCHEMAS)
    require_valid_calls(parsed(text, formats), SCHEMAS)


def test_a_vocabulary_without_the_tokens_around_calls(tmp_path: Path) -> None:
    herds.write_processor(tmp_path)
    tiny = load_tokenizer(tmp_path)
    grammars = Grammars(tiny, 512, tiny.stop_ids)
    for choice in ("auto", "required", "f"):
        assert accepts(grammars, tiny, GrammarSpec.tools(TOOLS, choice, True, ("pythonic",)), "[f()]")
