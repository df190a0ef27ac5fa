"""What a checkpoint's chat template does with tools, found by rendering it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ....errors import HerdError
from ....model.processing import ChatTemplate
from .openings import Format

_NAME, _RESULT, _NUMBER = "herd_probe", "herd_result", 70707
_TOOL = {"type": "function", "function": {
    "name": _NAME, "description": "A probe.", "parameters": {"type": "object", "properties": {}}}}
_CALL = {"id": "call00000", "type": "function", "function": {"name": _NAME, "arguments": {"number": _NUMBER}}}
_QUESTION: dict[str, Any] = {"role": "user", "content": "x"}
_CALLED: list[Mapping[str, Any]] = [_QUESTION, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
_ANSWERED = [*_CALLED, {"role": "tool", "tool_call_id": "call00000", "name": _NAME, "content": _RESULT}]


@dataclass(frozen=True)
class Abilities:
    """What a template prints.

    Attributes:
        offers_tools: the list of tools, and how to call them.
        prints_calls: past calls in the form that the model is asked for, their arguments as they are.
        prints_results: what tools gave back.
        format: how the model is asked to write calls, or shown that it did. Where the template says nothing, the model
            is asked by us, in the pythonic form.
    """

    offers_tools: bool
    prints_calls: bool
    prints_results: bool
    format: Format

    def writing(self, format: Format | None) -> Abilities:  # noqa: A002
        """What the template is good for where calls are to have a format: nothing, if it asks for the other one."""
        return self if format in (None, self.format) else Abilities(False, False, self.prints_results, format)


@lru_cache(maxsize=8)
def abilities(template: ChatTemplate) -> Abilities:
    """The abilities of a template; one that refuses such messages has none."""
    offered = _rendered(template, [_QUESTION], [_TOOL])
    called = _rendered(template, _ANSWERED) or _rendered(template, _CALLED)
    offers = _NAME in offered
    as_function = f"{_NAME}(" in called
    pythonic = not offers or as_function or "func_name1(" in offered
    # A template that prints every argument in quotes would teach the model to do so.
    as_it_is = _NAME in called and str(_NUMBER) in called and f'="{_NUMBER}"' not in called
    prints = as_it_is and (offers or as_function)
    return Abilities(offers, prints, _RESULT in called, "pythonic" if pythonic else "json")


def _rendered(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> str:
    try:
        return template.render(messages, tools=tools)
    except HerdError:
        return ""
