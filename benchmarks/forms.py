"""Whether answers have the form that was asked for: random JSON schemas, and calls of the tools of BFCL.

    python -m benchmarks.forms schemas BUNDLE [--count 500] [--clients 8] [--context 2048] [--url URL] [--json]
    python -m benchmarks.forms tools BUNDLE [--formats pythonic json] [--categories simple multiple parallel] ...

Everything is asked at temperature 1, unless told otherwise, over the whole vocabulary (top_p 1), so that a model which
knows nothing finds every hole of a grammar. ``schemas`` draws them from seeds (``tests/support/schemas.py``); every
fourth is asked once more without a form for an answer of the same length, in turns of 50 questions, so that both see
the same machine: the difference of the times per token is what a form costs. ``tools`` asks the questions of
``bfcl-eval`` with ``tool_choice`` required, every fifth one with auto as well, every other one streamed. ``--closing``
is a logit bias on what closes texts and lists: without it a model that knows nothing writes until its answer is cut.

Every answer is counted once: ``valid``; ``refused`` (400 before anything is generated); ``cut`` by the length limit,
which nothing can make whole; ``text`` (auto, no call); anything else is ``wrong``, and shown. ``stray`` are answers,
cut ones too, in which text stands beside calls under ``required``, such as the beginning of a call.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import httpx
from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from rich.table import Table

from herdgraph.console import emit_json, run_cli, stderr

from .bfcl import CATEGORIES, ToolQuestion, is_right, questions
from .chats import Answered, ask_all, milliseconds
from .screen import show_tables
from .serving import Contestant, ours, served

SAMPLED = {"top_p": 1, "top_k": 0, "min_p": 0}
AUTO_EVERY = 5
FREE_EVERY = 4
TURN = 50
CLOSING = '")]}'
SHOWN = 5
"""Wrong answers that are printed."""
_FORMATS = FormatChecker()


@_FORMATS.checks("date", ValueError)
def _is_date(text: object) -> bool:
    """A date of RFC 3339, which has a year 0000, a leap year as 2000 is; Python's calendar has none."""
    return not isinstance(text, str) or bool(date.fromisoformat("2000" + text[4:] if text[:4] == "0000" else text))


def schemas(url: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Random schemas, and free answers of the same lengths."""
    from tests.support.schemas import SchemaGenerator

    drawn = [SchemaGenerator(seed).schema() for seed in range(options.count)]
    bodies = [_body(seed, options, [{"role": "user", "content": f"What is thing {seed}?"}], stream=True)
              for seed in range(options.count)]
    formed: list[Answered] = []
    free: list[Answered] = []
    for first in range(0, options.count, TURN):
        turn = [{**body, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
                for body, schema in zip(bodies, drawn, strict=True)][first : first + TURN]
        answers = ask_all(url, turn, options.clients)
        again = [{**body, "response_format": None, "ignore_eos": True, "max_tokens": answer.tokens}
                 for body, answer in zip(turn, answers, strict=True) if answer.tokens]
        formed += answers
        free += ask_all(url, again[::FREE_EVERY], options.clients)
        stderr.print(f"{len(formed)} of {options.count} schemas")
    counted = _counted(formed, list(map(_kind_of_json, formed, drawn)))
    return [{"asked": "schemas", **counted, **_times(formed)},
            {"asked": "no form", "answers": len(free), "tokens": sum(answer.tokens for answer in free), **_times(free)}]


def tools(url: str, options: argparse.Namespace, form: str) -> list[dict[str, Any]]:
    """The questions of some categories, with calls required and not."""
    rows, biased = [], {"logit_bias": _closing(url, options.closing)} if options.closing else {}
    for category in options.categories:
        asked = questions(category)[: options.count]
        for choice, some in (("required", asked), ("auto", asked[::AUTO_EVERY])):
            bodies = [_body(place, options, one.messages, tools=one.tools, tool_choice=choice, stream=place % 2 == 0,
                            **(biased if choice == "required" else {}))
                      for place, one in enumerate(some)]
            answers = ask_all(url, bodies, options.clients)
            rows.append({"asked": f"{category}, {choice}, {form}", **_counted_calls(answers, some, choice)})
            stderr.print(table(rows[-1:]))
    return rows


def _body(seed: int, options: argparse.Namespace, messages: list[Any], **more: Any) -> dict[str, Any]:
    limit = {"max_tokens": options.max_tokens} if options.max_tokens else {}
    return {"messages": messages, "seed": seed, "temperature": options.temperature, **SAMPLED, **limit, **more}


def _closing(url: str, bias: float) -> dict[str, float]:
    """A bias on the tokens of what closes texts and lists."""
    replies = [httpx.post(f"{url}/tokenize", json={"prompt": text, "add_special_tokens": False}) for text in CLOSING]
    return {str(reply.json()["tokens"][-1]): bias for reply in replies}


def _counted(answers: Sequence[Answered], kinds: Sequence[str]) -> dict[str, Any]:
    """Answers by what became of them, and their tokens."""
    for place in [place for place, kind in enumerate(kinds) if kind == "wrong"][:SHOWN]:
        stderr.print(f"wrong, question {place}: {answers[place]}", markup=False)
    refusals = Counter(answer.refusal for answer, kind in zip(answers, kinds, strict=True) if kind == "refused")
    return {"answers": len(answers), **Counter(kinds), "tokens": sum(answer.tokens for answer in answers),
            "reasons": dict(refusals.most_common())}


def _counted_calls(answers: Sequence[Answered], asked: Sequence[ToolQuestion], choice: str) -> dict[str, Any]:
    kinds = [_kind_of_calls(answer, one, choice) for answer, one in zip(answers, asked, strict=True)]
    counted = _counted(answers, kinds)
    right = sum(kind == "valid" and is_right(_loaded(answer), one.expected)
                for kind, answer, one in zip(kinds, answers, asked, strict=True))
    stray = sum(choice == "required" and bool(answer.calls and answer.text) for answer in answers)
    return {**counted, "calls": sum(len(answer.calls) for answer in answers), "right": right, "stray": stray}


def _kind_of_json(answer: Answered, schema: dict[str, Any]) -> str:
    if (early := _early(answer)) is not None:
        return early
    try:
        Draft202012Validator(schema, format_checker=_FORMATS).validate(json.loads(answer.text, parse_constant=_no_json))
    except (ValueError, ValidationError):
        return "wrong"
    return "valid" if answer.finish == "stop" else "wrong"


def _kind_of_calls(answer: Answered, asked: ToolQuestion, choice: str) -> str:
    if (early := _early(answer)) is not None:
        return early
    if choice == "auto" and answer.finish == "stop" and not answer.calls:
        return "text"
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in asked.tools}
    try:
        for name, arguments in _loaded(answer):
            Draft202012Validator(parameters[name]).validate(arguments)
    except (ValueError, KeyError, ValidationError):
        return "wrong"
    alone = choice == "auto" or not answer.text
    return "valid" if answer.finish == "tool_calls" and answer.calls and alone else "wrong"


def _early(answer: Answered) -> str | None:
    """What became of an answer that is not to be looked at; None for all others."""
    if answer.refusal:
        return "refused" if answer.status == 400 else "wrong"
    return "cut" if answer.finish == "length" else None


def _loaded(answer: Answered) -> list[tuple[str, dict[str, Any]]]:
    return [(name, json.loads(arguments, parse_constant=_no_json)) for name, arguments in answer.calls]


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _times(answers: Sequence[Answered]) -> dict[str, float]:
    return {f"ms {name}": value for name, value in milliseconds(answers).items()}


@contextmanager
def _server(options: argparse.Namespace, *more: str) -> Iterator[str]:
    """The server that was named, or a new one; its URL."""
    if options.url:
        yield options.url
        return
    command = (*ours(options.bundle, options.threads).command, "--context", str(options.context), *more)
    with served(Contestant("herdgraph", command), options.clients, options.context) as url:
        ask_all(url, [{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1,
                       "response_format": {"type": "json_object"}}], 1)  # the vocabulary of grammars is built
        yield url


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Rows for people; reasons stand in lines of their own."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "reasons"))
    shown = Table(*names)
    for row in rows:
        cells = (row.get(name, 0 if name in ("refused", "cut", "wrong") else "") for name in names)
        shown.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells))
    return shown


def main() -> None:
    """Parse, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["schemas", "tools"])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=500, help="schemas, or at most so many questions of a category")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, help="of an answer; without it all that the context leaves")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--closing", type=float, default=0.0, metavar="BIAS")
    parser.add_argument("--categories", nargs="+", choices=list(CATEGORIES), default=list(CATEGORIES))
    parser.add_argument("--formats", nargs="+", default=["pythonic", "json"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--url", help="of a server that runs already; its own format of calls counts")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.what == "schemas":
        with _server(options) as url:
            rows = schemas(url, options)
    else:
        for form in ["the server's"] if options.url else options.formats:
            with _server(options, "--tool-format", form) as url:
                rows += tools(url, options, form)
    for row in rows:
        for reason, count in row.get("reasons", {}).items():
            stderr.print(f"{row['asked']}: refused {count} times: {reason}", markup=False)
    emit_json(rows) if options.json else show_tables(table(rows))


if __name__ == "__main__":
    run_cli(main)
