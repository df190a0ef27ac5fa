"""What a checkpoint's chat template does with tools, found by rendering it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ....errors import HerdError
from ....model.processing import ChatTemplate
from .openings import Format

_NAME, _RESULT = "herd_probe", "herd_result"
_TOOL = {"type": "function", "function": {
    "name": _NAME, "description": "A probe.", "parameters": {"type": "object", "properties": {}}}}
_CALL = {"id": "call_0", "type": "function", "function": {"name": _NAME, "arguments": {"number": 7}}}
_QUESTION = {"role": "user", "content": "x"}


@dataclass(frozen=True)
class Abilities:
    """What a template prints.

    Attributes:
        offers_tools: the list of tools, and how to call them.
        prints_calls: past calls, their arguments as they are.
        prints_results: what tools gave back.
        format: how the model is asked to write calls, or shown that it did. Where the template says nothing, the model
            is asked by us, in the pythonic form.
    """

    offers_tools: bool
    prints_calls: bool
    prints_results: bool
    format: Format


@lru_cache(maxsize=8)
def abilities(template: ChatTemplate) -> Abilities:
    """The abilities of a template; one that refuses such messages has none."""
    offered = _rendered(template, [_QUESTION], [_TOOL])
    called = _rendered(template, [_QUESTION, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, _QUESTION])
    answered = _rendered(template, [
        _QUESTION, {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "tool_call_id": "call_0", "name": _NAME, "content": _RESULT}])
    offers = _NAME in offered
    # A template that prints every argument in quotes would teach the model to do so.
    prints = _NAME in called and "7" in called and '="7"' not in called
    pythonic = not offers or f"{_NAME}(" in called or "func_name1(" in offered
    return Abilities(offers, prints, _RESULT in answered, "pythonic" if pythonic else "json")


def _rendered(template: ChatTemplate, messages: list[Mapping[str, Any]], tools: list[Any] | None = None) -> str:
    try:
        return template.render(messages, tools=tools)
    except HerdError:
        return ""
