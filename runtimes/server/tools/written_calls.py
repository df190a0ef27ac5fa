"""Calls written as a model writes them, for prompts that show what it called before."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .openings import Format

_KEYWORD = re.compile(r"[A-Za-z0-9_]+")
_CONSTANTS = {None: "None", True: "True", False: "False"}


def written_calls(calls: Sequence[Mapping[str, Any]], format: Format) -> str:  # noqa: A002
    """Calls in the form that ``ToolParser`` reads.

    Args:
        calls: each with the ``name`` of a tool and a dictionary of ``arguments``.
        format: how calls are written.
    """
    if format == "json":
        return "; ".join(json.dumps({"type": "function", "name": call["name"], "parameters": call["arguments"]},
                                    ensure_ascii=False) for call in calls)
    return f"[{', '.join(_pythonic(call['name'], call['arguments']) for call in calls)}]"


def _pythonic(name: str, arguments: Mapping[str, Any]) -> str:
    if not all(_KEYWORD.fullmatch(key) for key in arguments):
        return f"{name}(**{python_literal(arguments)})"
    return f"{name}({', '.join(f'{key}={python_literal(value)}' for key, value in arguments.items())})"


def python_literal(value: Any) -> str:
    """A value of JSON as Python writes it, texts in double quotes."""
    if isinstance(value, Mapping):
        pairs = (f"{json.dumps(key, ensure_ascii=False)}: {python_literal(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(python_literal, value))}]"
    if value is None or isinstance(value, bool):
        return _CONSTANTS[value]
    return json.dumps(value, ensure_ascii=False)
