"""The body of ``/v1/responses`` to a chat's body."""

from __future__ import annotations

from typing import Any

from .errors import validated, wrong
from .protocol.chat import ChatBody
from .protocol.responses import NamedFunction, ResponsesBody, ResponseTool, TextFormat

_ROLES = ("system", "developer", "user", "assistant")


def chat_body(body: ResponsesBody) -> ChatBody:
    """The chat that says the same.

    Raises:
        ApiError: something that needs a memory, or that this server does not do.
    """
    _refuse_memory(body)
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for place, item in enumerate(items):
        _add(messages, place, item)
    given: dict[str, Any] = {
        "messages": messages, "max_completion_tokens": body.max_output_tokens, "temperature": body.temperature,
        "top_p": body.top_p, "logprobs": body.top_logprobs is not None or None, "top_logprobs": body.top_logprobs,
        "parallel_tool_calls": body.parallel_tool_calls, "stream": body.stream}
    if body.tools:
        given["tools"] = [_tool(tool) for tool in body.tools]
    if body.tool_choice is not None:
        named = isinstance(body.tool_choice, NamedFunction)
        given["tool_choice"] = _named(body.tool_choice) if named else body.tool_choice
    if body.text and body.text.format:
        given["response_format"] = _format(body.text.format)
    return validated(ChatBody, given, "input")


def _refuse_memory(body: ResponsesBody) -> None:
    for name in ("previous_response_id", "conversation"):
        if getattr(body, name) is not None:
            raise wrong(f"{name} is not supported: this server keeps nothing, send the whole conversation as input",
                        name, "unsupported_parameter")
    if body.background:
        raise wrong("background is not supported: this server keeps nothing", "background", "unsupported_parameter")


def _add(messages: list[dict[str, Any]], place: int, item: dict[str, Any]) -> None:
    """Add an item of the input; calls of one turn become one message."""
    kind = item.get("type", "message")
    if kind == "message" and item.get("role") in _ROLES:
        messages.append({"role": item["role"], "content": _content(place, item.get("content"))})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        call = {"id": item.get("call_id") or "", "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = item.get("output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": _content(place, output)})
    elif kind != "reasoning":
        raise wrong(f"input item {place} is neither a message, a function_call nor a function_call_output",
                    f"input.{place}")


def _content(place: int, content: Any) -> Any:
    if isinstance(content, str) or not isinstance(content, list):
        return content
    return [_part(place, part) for part in content]


def _part(place: int, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("input_text", "output_text", "text"):
        return {"type": "text", "text": part.get("text")}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    raise wrong(f"input item {place} has a part that is neither input_text nor an input_image with image_url",
                f"input.{place}")


def _tool(tool: ResponseTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _named(choice: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": choice.name}}


def _format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema_}}
