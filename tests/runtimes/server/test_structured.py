"""Constraints on answers: what is allowed, what is refused at the door, and random answers that must be valid."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_models.llama4.tokenizer as meta
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from herdgraph.errors import HerdError
from herdgraph.model.processing import Tokenizer, load_tokenizer
from herdgraph.runtimes.server.structured import Grammars, GrammarSpec, TokenConstraint
from support import herds
from support.random_model import RandomModel
from support.schemas import REFUSED, SchemaGenerator

CALF = Path(__file__).parents[3] / "examples" / "calf" / "checkpoint"
WIDER = 21
"""Logits that the model has beyond the tokenizer's vocabulary."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(CALF)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size + WIDER, tokenizer.stop_ids)


def allowed(constraint: TokenConstraint, size: int) -> set[int]:
    logits_V = np.zeros(size, np.float32)
    constraint.apply(logits_V)
    return set(np.flatnonzero(np.isfinite(logits_V)).tolist())


def accepts(grammars: Grammars, tokenizer: Tokenizer, spec: GrammarSpec, text: str) -> bool:
    """Whether a text is a whole answer."""
    constraint = grammars.compile(spec)
    for token in tokenizer.encode(text):
        if token not in allowed(constraint, tokenizer.vocab_size):
            return False
        constraint.accept(token)
    return tokenizer.stop_ids <= allowed(constraint, tokenizer.vocab_size)


PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
          "required": ["name"], "additionalProperties": False}


@pytest.mark.parametrize(("spec", "good", "bad"), [
    (GrammarSpec.json_object(), ['{}', '{"a": [1, null, {"b": "é"}]}'], ["[]", "1", "", '{"a": 1', '{"a": 1} ']),
    (GrammarSpec.json_schema(PERSON), ['{"name": "A"}', '{\n  "name": "A",\n  "age": 3\n}'],
     ['{"age": 3}', '{"name": "A", "age": -1}', '{"name": "A", "x": 1}', '{"name": "A" ' + " " * 21 + "}"]),
    (GrammarSpec.json_schema(True), ["1", '"a"', "[]"], ["a", ""]),
    (GrammarSpec.regex("[a-c]{2,3}x?"), ["ab", "abcx"], ["a", "abcd", "ab "]),
    (GrammarSpec.choice(["yes", 'no "really"', "a\nb"]), ["yes", 'no "really"', "a\nb"], ["ye", "yes!", ""]),
    (GrammarSpec.lark('start: "<" start ">" | "."'), [".", "<<.>>"], ["<.", "<>"]),
], ids=["object", "schema", "any", "regex", "choice", "lark"])
def test_what_is_allowed(
    spec: GrammarSpec, good: list[str], bad: list[str], grammars: Grammars, tokenizer: Tokenizer
) -> None:
    assert [text for text in good if not accepts(grammars, tokenizer, spec, text)] == []
    assert [text for text in bad if accepts(grammars, tokenizer, spec, text)] == []


@pytest.mark.parametrize("schema", REFUSED, ids=str)
def test_schemas_that_cannot_be_enforced_are_refused(schema: dict[str, Any], grammars: Grammars) -> None:
    for wrapped in (schema, {"type": "object", "properties": {"a": schema}, "required": ["a"]}):
        with pytest.raises(HerdError) as caught:
            grammars.compile(GrammarSpec.json_schema(wrapped))
        assert "\n" not in str(caught.value)


def test_a_schema_cannot_turn_its_enforcement_off(grammars: Grammars) -> None:
    lenient = {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}
    with pytest.raises(HerdError, match=r"cannot be enforced: Unimplemented keys.*uniqueItems"):
        grammars.compile(GrammarSpec.json_schema(lenient))


@pytest.mark.parametrize(("make", "reason"), [
    (lambda: GrammarSpec.regex("(?=a)b"), "look-around"),
    (lambda: GrammarSpec.regex("(a"), "unclosed group"),
    (lambda: GrammarSpec.regex(5), "the regular expression is 5, a text is needed"),
    (lambda: GrammarSpec.lark("start: nothing"), "nothing"),
    (lambda: GrammarSpec.lark("start: <|python_tag|>"), "unknown special token"),
    (lambda: GrammarSpec.choice([]), "a list of texts is needed"),
    (lambda: GrammarSpec.choice(["a", 1]), "a list of texts is needed"),
    (lambda: GrammarSpec.choice(["a"] * 5000), "5000 choices, at most 4096"),
    (lambda: GrammarSpec.json_schema([]), "an object is needed"),
    (lambda: GrammarSpec.json_schema(False), "an object is needed"),
    (lambda: GrammarSpec.json_schema({"description": "x" * 300_000}), "at most 262144 are taken"),
    (lambda: GrammarSpec.json_schema({"const": "\ud800"}), "no Unicode character"),
    (lambda: GrammarSpec.json_schema({"minimum": 1, "exclusiveMinimum": True}), "as in draft 4: write its number"),
    (lambda: GrammarSpec.json_schema({"properties": {str(number): {} for number in range(1001)}}), "at most 1000 are"),
    (lambda: GrammarSpec.json_schema(_deep(80)), "nested more than"),
])
def test_refusals(make: Any, reason: str, grammars: Grammars) -> None:
    with pytest.raises(HerdError, match=reason) as caught:
        grammars.compile(make())
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def test_a_grammar_that_becomes_too_complex_says_so(grammars: Grammars, tokenizer: Tokenizer) -> None:
    rules = [f'a{number}: "x" start "y"{{0,{number + 1}}}' for number in range(40)]
    alternatives = " | ".join(f"a{number}" for number in range(40))
    constraint = grammars.compile(GrammarSpec.lark("\n".join([f"start: ({alternatives})*", *rules])))

    def go_on() -> None:
        for _ in range(100):
            constraint.apply(np.zeros(tokenizer.vocab_size, np.float32))
            constraint.accept(tokenizer.encode("x")[0])

    with pytest.raises(HerdError, match=r"the grammar cannot go on: .*items") as caught:
        go_on()
    assert "\n" not in str(caught.value)


def test_wide_schemas(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """As wide as is taken, they are still enforced; what says nothing is no reason to refuse."""
    wide = {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(1000)}}
    for schema in (wide, {"anyOf": [wide, {"type": "array", "items": {"type": "integer"}, "uniqueItems": False}]}):
        assert accepts(grammars, tokenizer, GrammarSpec.json_schema(schema), '{"p3": 1, "p999": 2}')
        assert not accepts(grammars, tokenizer, GrammarSpec.json_schema(schema), '{"p3": 1, "p999": "2"}')


def test_many_choices(grammars: Grammars, tokenizer: Tokenizer) -> None:
    spec = GrammarSpec.choice([f"choice number {number}" for number in range(4096)])
    assert accepts(grammars, tokenizer, spec, "choice number 4095")
    assert not accepts(grammars, tokenizer, spec, "choice number 4096")


def test_an_answer_from_the_first_to_the_last_token(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.compile(GrammarSpec.choice(["yes", "no"]))
    size = tokenizer.vocab_size + WIDER
    assert max(allowed(constraint, size)) < tokenizer.vocab_size
    assert not tokenizer.stop_ids & allowed(constraint, size)
    other = constraint.fork()
    for token in tokenizer.encode("no"):
        assert not constraint.is_complete
        constraint.accept(token)
    assert constraint.is_complete
    assert allowed(constraint, size) == tokenizer.stop_ids
    constraint.accept(min(tokenizer.stop_ids))
    assert constraint.is_complete
    assert allowed(constraint.fork(), size) == tokenizer.stop_ids
    assert not other.is_complete
    assert allowed(other, size).isdisjoint(tokenizer.stop_ids)
    with pytest.raises(HerdError, match=r"does not continue what the grammar allows|cannot go on"):
        other.accept(tokenizer.encode("#")[0])


def test_logits_that_are_allowed_keep_their_values(grammars: Grammars, tokenizer: Tokenizer) -> None:
    spec = GrammarSpec.json_object()
    logits_V = np.random.default_rng(0).normal(size=tokenizer.vocab_size + WIDER).astype(np.float32)
    masked_V, late_V = logits_V.copy(), logits_V.copy()
    constraint, late = grammars.compile(spec), grammars.compile(spec)
    constraint.prepare()
    constraint.prepare()
    constraint.apply(masked_V)
    late.apply(late_V)
    assert np.array_equal(masked_V, late_V)
    kept = np.isfinite(masked_V)
    assert kept.any()
    assert np.array_equal(masked_V[kept], logits_V[kept])


def test_masks_that_are_asked_for_together_are_those_of_each(grammars: Grammars, tokenizer: Tokenizer) -> None:
    specs = [GrammarSpec.choice([word]) for word in ("yes", "no", "perhaps")] + [GrammarSpec.json_object()]
    alone, together = ([grammars.compile(spec) for spec in specs] for _ in range(2))
    for constraint in together:
        constraint.prepare()
    size = tokenizer.vocab_size + WIDER
    assert [allowed(one, size) for one in together] == [allowed(one, size) for one in alone]
    together[0].prepare()
    together[0].accept(tokenizer.encode("yes")[0])  # waits for the mask, which is then that of another place
    alone[0].accept(tokenizer.encode("yes")[0])
    assert allowed(together[0], size) == allowed(alone[0], size)


def test_grammars_are_kept_and_used_by_many_threads(grammars: Grammars, tokenizer: Tokenizer) -> None:
    def run(number: int) -> str | None:
        spec = GrammarSpec.choice([f"answer {number % 3}"])
        return RandomModel(tokenizer, tokenizer.vocab_size + WIDER, number).answer(grammars.compile(spec))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(run, range(12))) == [f"answer {number % 3}" for number in range(12)]


@pytest.mark.parametrize("seeds", [range(start, start + 10) for start in range(0, 50, 10)], ids=str)
def test_random_answers_are_valid(seeds: range, grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Random schemas, random logits: every answer that ends is JSON of its schema."""
    finished = 0
    for seed in seeds:
        schema = SchemaGenerator(seed).schema()
        try:
            constraint = grammars.compile(GrammarSpec.json_schema(schema))
        except HerdError:
            continue
        answer = RandomModel(tokenizer, tokenizer.vocab_size + WIDER, seed).answer(constraint)
        if answer is not None:
            Draft202012Validator(schema).validate(json.loads(answer))
            finished += 1
    assert finished > 7


def test_other_vocabularies(tmp_path: Path) -> None:
    """The beginning of Meta's file by tiktoken, and one that spells bytes; a model that never ends is refused."""
    herds.write_processor(tmp_path)
    tiny = load_tokenizer(tmp_path)
    schema = GrammarSpec.json_schema(PERSON)
    assert accepts(Grammars(tiny, 512, tiny.stop_ids), tiny, schema, '{"name": "日本", "age": 3}')
    with pytest.raises(HerdError, match="no token that ends an answer"):
        Grammars(tiny, 512, ()).compile(schema)
    (tmp_path / "tokenizer.json").unlink()
    lines = (Path(meta.__file__).parent / "tokenizer.model").read_bytes().splitlines(keepends=True)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:3000]))
    llama4 = load_tokenizer(tmp_path)
    grammars = Grammars(llama4, llama4.vocab_size, llama4.stop_ids)
    assert accepts(grammars, llama4, schema, '{"name": "日本", "age": 3}')
    assert not accepts(grammars, llama4, schema, '{"name": "日本", "age": "3"}')
