"""Messages and tools of a request in the form that a checkpoint's chat template understands.

Templates want arguments as dictionaries where clients send text. Where a template does not know tools, they are
offered in the system message, beside the user's own, and calls and results are shown as text. All of that is what
people and tools say: no special token in it ever becomes one (see ``model.processing.control_tokens``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ....errors import HerdError, shown
from ....model.processing import ChatTemplate
from ....model.processing.messages import checked_messages, plain_copy
from .abilities import Abilities, abilities
from .definitions import Tool, checked_tools, require_name
from .openings import FORMATS, Format
from .written_calls import written_calls

_INSTRUCTIONS = """\
You answer questions, and you may invoke functions for it. Invoke a function only if it is listed below, if it fits \
the question, and if all of its required parameters are known; ask for those that are missing. Otherwise answer in \
plain text.

To invoke functions, output nothing but the calls, in exactly this format:
{example}. The results come in the next message; use them for your answer.

Here is a list of functions in JSON format that you can invoke:

{functions}"""
"""Asks for calls as Meta's prompt format for Llama 4 does."""
_EXAMPLES: dict[Format, str] = {
    "pythonic": '[func_name1(param1=value1, param2="value2"), func_name2(param1=value1)]\nValues are Python literals',
    "json": '{"type": "function", "name": "func_name1", "parameters": {"param1": "value1"}}; {"type": "function", '
            '"name": "func_name2", "parameters": {}}\nValues are JSON',
}


def prepare_messages(
    messages: Any, tools: Sequence[Any] | None, template: ChatTemplate, format: Format | None = None  # noqa: A002
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """What to render.

    Args:
        messages: in OpenAI's form.
        tools: in OpenAI's form or checked, None for none.
        template: the checkpoint's.
        format: how the model is to write calls, None for what the template asks for.

    Returns:
        Checked messages, and the tools that the template is to offer.

    Raises:
        HerdError: a message, a tool or a call is wrong, with its place.
    """
    can, names = abilities(template).writing(format), dict[str, str]()
    prepared = [_prepared(index, message, can, names) for index, message in enumerate(checked_messages(messages))]
    if not tools:
        return prepared, None
    offered = checked_tools(tools)
    if can.offers_tools:
        return prepared, [tool.described() for tool in offered]
    return _with_instructions(prepared, offered, can.format), None


def call_formats(template: ChatTemplate) -> tuple[Format, ...]:
    """How a model with this template is asked to write calls, and how it may do instead."""
    asked = abilities(template).format
    return (asked, *(form for form in FORMATS if form != asked))


def _prepared(index: int, message: dict[str, Any], can: Abilities, names: dict[str, str]) -> dict[str, Any]:
    """One message.

    Args:
        index: of the message.
        message: as it was sent.
        can: what the template prints.
        names: of the tools called so far by the ids of the calls.
    """
    if message["role"] == "assistant" and message.get("tool_calls"):
        calls = _checked_calls(f"message {index}", message["tool_calls"])
        names.update((call["id"], call["function"]["name"]) for call in calls)
        if can.prints_calls:
            return {**message, "tool_calls": calls}
        kept = {name: value for name, value in message.items() if name != "tool_calls"}
        return _extended(kept, written_calls([call["function"] for call in calls], can.format))
    if message["role"] != "tool":
        return message
    if not can.prints_results:
        return {"role": "user", "content": message["content"]}
    name = names.get(str(message.get("tool_call_id")))
    return {"name": name, **message} if name else message


def _checked_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise HerdError(f"{where} has {shown(calls)} as tool_calls, a list is needed")
    return [_checked_call(f"{where}, call {number}", call) for number, call in enumerate(calls)]


def _checked_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise HerdError(f'{where} is {shown(call)}, {{"id": …, "type": "function", "function": {{…}}}} is needed')
    return {"id": str(call.get("id") or ""), "type": "function", "function": {
        "name": require_name(function.get("name"), where), "arguments": _arguments(where, function.get("arguments"))}}


def _arguments(where: str, given: Any) -> dict[str, Any]:
    """Arguments as a dictionary, from JSON where they are text."""
    try:
        value = json.loads(given, parse_constant=_refuse, parse_float=_finite) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise HerdError(f"{where} has arguments that are no JSON: {error}") from error
    plain = plain_copy(value, f"the arguments of {where}")
    if not isinstance(plain, dict):
        raise HerdError(f"{where} has {shown(given)} as arguments, a JSON object is needed")
    return plain


def _with_instructions(
    messages: list[dict[str, Any]], tools: Sequence[Tool], format: Format  # noqa: A002
) -> list[dict[str, Any]]:
    functions = json.dumps([tool.described()["function"] for tool in tools], indent=4, ensure_ascii=False)
    text = _INSTRUCTIONS.format(example=_EXAMPLES[format], functions=functions)
    if messages[0]["role"] == "system":
        return [_extended(messages[0], f"\n\n{text}"), *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _extended(message: dict[str, Any], text: str) -> dict[str, Any]:
    """A message with text after its content."""
    content = message["content"]
    longer = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return {**message, "content": longer}


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
