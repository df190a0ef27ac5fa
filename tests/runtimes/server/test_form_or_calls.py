"""A form of the answer beside tools that may be called: the answer fits the form, or is valid calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from herdgraph.errors import HerdError
from herdgraph.model.processing import Tokenizer, load_tokenizer
from herdgraph.runtimes.server.structured import FormOrCalls, Grammars, GrammarSpec
from herdgraph.runtimes.server.tools import CallArguments, CallStart, LeadingCallParser, Part, TextPart, joined
from herdgraph.runtimes.server.tools.openings import FORMATS, Format
from support.random_model import RandomModel

CALF = Path(__file__).parents[3] / "examples" / "calf" / "checkpoint"
PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"],
              "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("f", "look-up")]
ANY = GrammarSpec.json_object()
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
          "required": ["name"], "additionalProperties": False}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(CALF)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)


def beside(grammars: Grammars, form: GrammarSpec, formats: tuple[Format, ...] = FORMATS,
           parallel: bool = True) -> FormOrCalls:
    specs = (form, GrammarSpec.no_calls(TOOLS, formats), GrammarSpec.calls(TOOLS, parallel, formats))
    return FormOrCalls(*map(grammars.compile, specs))


def accepts(constraint: FormOrCalls, tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text, special tokens in it, is a whole answer."""
    for token in [*tokenizer.encode(text, allow_special=True), max(tokenizer.stop_ids)]:
        logits_V = np.zeros(tokenizer.vocab_size, np.float32)
        constraint.prepare()
        constraint.apply(logits_V)
        if not np.isfinite(logits_V[token]):
            return False
        constraint.accept(token)
    return True


def parsed(text: str, formats: tuple[Format, ...] = FORMATS, cut: int = 1000) -> list[Part]:
    parser = LeadingCallParser(TOOLS, formats)
    pieces = [text[at : at + cut] for at in range(0, len(text), cut)]
    return joined([*(part for piece in pieces for part in parser.feed(piece)), *parser.finish()])


CALLS = ["[f(x=1)]", "[f(x=1), look-up(x=2)]", '{"name": "f", "parameters": {"x": 1}}', "[\n f(x=1)]",
         '{"type": "function", "name": "f", "parameters": {"x": 1}}; {"name":"look-up","arguments":{"x":2}}',
         "<|python_start|>[f(x=1)]<|python_end|>"]


@pytest.mark.parametrize(("form", "good", "bad"), [
    (ANY, ["{}", '{"name": "f"}', '{"name": "g", "parameters": {"x": 1}}', '{"parameters": {}, "name": "f"}',
           '{"a": "[f(x=1)]"}', '{"name": "f", "x": 1, "parameters": 2}', '{"type": "function", "name": "fo"}',
           '{\n  "name": "f", "parameters": 1}'],
     ["", "Hi", "[f(x=1)] {}", "[f(x=true)]", '{"name": "f", "parameters": {"x": 1}, "y": 2}', "[1]",
      '{"name": "f", "parameters": 5}', '{"type": "function", "name": "look-up", "parameters": {"y": 5}}']),
    (GrammarSpec.json_schema(PERSON), ['{"name": "f"}', '{"name": "f", "age": 3}'],
     ["{}", '{"name": "f", "age": "3"}', '{"name": "f", "parameters": {}}', "Hm [f(x=1)]"]),
    (GrammarSpec.json_schema({"type": "array"}), ["[]", "[1, 2]", '["f("]'], ["[f]", "[f(]", "{}"]),
    (GrammarSpec.choice(["[", "[f", "yes"]), ["[", "[f", "yes"], ["[f(", "no", ""]),
    (GrammarSpec.regex(r"(?s:.*)"), ["", "[f", "Hm [f(x=1)]", " [f(x=1)]", "<|python"], ["[f(", "[ f(x=yes)]"]),
], ids=["object", "schema", "array", "choice", "regex"])
def test_an_answer_fits_the_form_or_calls(
    form: GrammarSpec, good: list[str], bad: list[str], grammars: Grammars, tokenizer: Tokenizer
) -> None:
    """What begins as a call is a call, though the form would take it."""
    assert [text for text in [*good, *CALLS] if not accepts(beside(grammars, form), tokenizer, text)] == []
    assert [text for text in bad if accepts(beside(grammars, form), tokenizer, text)] == []
    assert [parsed(text) for text in good if text] == [[TextPart(text)] for text in good if text]


@pytest.mark.parametrize("formats", [("pythonic",), ("json",)])
def test_calls_have_the_forms_that_were_chosen(
    formats: tuple[Format, ...], grammars: Grammars, tokenizer: Tokenizer
) -> None:
    """The other one is what it is by the answer's form."""
    for text in CALLS[:3]:
        other = ("[" in text) != (formats == ("pythonic",))
        answers = accepts(beside(grammars, ANY, formats, parallel=False), tokenizer, text)
        assert answers == (("look-up" not in text) if not other else "{" in text)
        assert isinstance(parsed(text, formats)[0], TextPart) == other


def test_no_token_that_continues_neither(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = beside(grammars, ANY)
    assert not constraint.is_complete
    with pytest.raises(HerdError, match="continues neither the answer's form nor a call"):
        constraint.accept(tokenizer.encode("?")[0])


def test_forks_go_their_own_ways(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = beside(grammars, ANY, parallel=False)
    other = constraint.fork()
    assert accepts(constraint, tokenizer, "[f(x=1)]")
    assert constraint.is_complete
    assert accepts(other, tokenizer, "{}")


@pytest.mark.parametrize("begin", ["", '{"name": "f', "[", '{"type": "function", "name": "look-up"'])
def test_random_answers_are_valid(begin: str, grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Random logits: whatever ends is read as calls that fit their schema, or as one text that is of the form."""
    ended = 0
    for seed in range(6):
        answer = RandomModel(tokenizer, tokenizer.vocab_size, seed).answer(beside(grammars, ANY), begin)
        if answer is None:
            continue
        ended += 1
        found = parsed(answer)
        if isinstance(found[0], TextPart):
            assert found == [TextPart(answer)]
            assert isinstance(json.loads(answer), dict)
        else:
            starts, arguments = found[::2], found[1::2]
            assert all(isinstance(start, CallStart) for start in starts)
            for part in arguments:
                assert isinstance(part, CallArguments)
                Draft202012Validator(PARAMETERS).validate(json.loads(part.fragment))
    assert ended


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([*CALLS[:5], '{"name": "f"}', "[f", "{", "", '{"a": "[f(x=1)]"}', "<|python_start|>[f(x=1)]"]),
       st.integers(1, 9))
def test_cuts_change_nothing(text: str, cut: int) -> None:
    def plain(parts: list[Part]) -> list[Any]:
        return [part.name if isinstance(part, CallStart) else part for part in parts]

    assert plain(parsed(text, cut=cut)) == plain(parsed(text))
