"""Questions of the Berkeley Function-Calling Leaderboard, version 4: PyPI package ``bfcl-eval`` (Apache-2.0).

The package is downloaded and opened, not installed. Functions are described in a dialect of JSON Schema, which is
translated. Answers are compared by the rule of its AST checker: a value is right if it is one of those that are listed,
texts without regard to case, blanks and punctuation; ``""`` in the list means that an argument may be left out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herdgraph.errors import HerdError

PACKAGE = "bfcl-eval==2026.3.23"
CACHE = Path(".cache/bfcl")
CATEGORIES = {"simple": "simple_python", "multiple": "multiple", "parallel": "parallel"}
_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
_IGNORED = re.compile(r"[ ,./\-_*^]")


@dataclass(frozen=True)
class ToolQuestion:
    """A question with the functions that may answer it.

    Attributes:
        messages: of a chat.
        tools: in OpenAI's form.
        expected: the calls that are right, each argument with all its right values.
    """

    messages: list[dict[str, str]]
    tools: list[dict[str, Any]]
    expected: list[dict[str, dict[str, list[Any]]]]


def questions(category: str) -> list[ToolQuestion]:
    """All questions of ``simple``, ``multiple`` or ``parallel``.

    Raises:
        HerdError: the package cannot be downloaded.
    """
    name = f"BFCL_v4_{CATEGORIES[category]}.json"
    with zipfile.ZipFile(_wheel()) as wheel:
        asked, answers = ([json.loads(line) for line in wheel.read(f"bfcl_eval/data/{folder}{name}").splitlines()]
                          for folder in ("", "possible_answer/"))
    expected = {answer["id"]: answer["ground_truth"] for answer in answers}
    return [ToolQuestion(one["question"][0], [_tool(function) for function in one["function"]], expected[one["id"]])
            for one in asked]


def _wheel() -> Path:
    if not list(CACHE.glob("bfcl_eval-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
                   "-d", str(CACHE), PACKAGE]
        if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
            raise HerdError(f"pip could not download {PACKAGE}: put its wheel into {CACHE}")
    return next(CACHE.glob("bfcl_eval-*.whl"))


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {**function, "parameters": json_schema(function["parameters"])}}


def json_schema(described: dict[str, Any]) -> dict[str, Any]:
    """A schema of the dialect as JSON Schema: its types are Python's, and ``any`` is no type at all."""
    schema = {key: value for key, value in described.items() if key not in ("type", "optional")}
    if (kind := described.get("type", "any")) != "any":
        schema["type"] = _TYPES.get(kind, kind)
    if isinstance(schema.get("properties"), dict):
        schema["properties"] = {name: json_schema(inner) for name, inner in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        schema["items"] = json_schema(schema["items"])
    return schema


def is_right(calls: Sequence[tuple[str, dict[str, Any]]], expected: Sequence[dict[str, dict[str, Any]]]) -> bool:
    """Whether calls are the expected ones, in any order."""
    left = list(calls)
    for wanted in expected:
        fitting = next((call for call in left if call[0] in wanted and _fits(call[1], wanted[call[0]])), None)
        if fitting is None:
            return False
        left.remove(fitting)
    return not left


def _fits(given: dict[str, Any], wanted: dict[str, list[Any]]) -> bool:
    """Whether every argument has one of its right values, and those that are missing may be."""
    known = all(name in wanted and any(_same(value, right) for right in wanted[name]) for name, value in given.items())
    return known and all("" in rights for name, rights in wanted.items() if name not in given)


def _same(given: Any, right: Any) -> bool:
    if isinstance(given, str) and isinstance(right, str):
        return _plain(given) == _plain(right)
    if isinstance(given, list) and isinstance(right, list):
        return len(given) == len(right) and all(map(_same, given, right))
    if isinstance(given, dict) and isinstance(right, dict):
        return _fits(given, right)
    return isinstance(given, bool) == isinstance(right, bool) and bool(given == right)


def _plain(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')
