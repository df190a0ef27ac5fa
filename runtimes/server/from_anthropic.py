"""Anthropic's messages to a chat's body."""

from __future__ import annotations

import json
from typing import Any

from .errors import validated, wrong
from .protocol.chat import ChatBody
from .protocol.messages import (
    AnthropicMessage,
    AnthropicTool,
    CountBody,
    ImageBlock,
    MessagesBody,
    TextBlock,
    ThinkingBlock,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_body(body: CountBody) -> ChatBody:
    """The chat that says the same.

    Raises:
        ApiError: something that only Anthropic's own server can do.
    """
    messages = _system(body) + [plain for message in body.messages for plain in _messages(message)]
    given: dict[str, Any] = {"messages": messages}
    if body.tools:
        given["tools"] = [_tool(tool) for tool in body.tools]
    if body.tool_choice:
        given["tool_choice"] = _choice(body.tool_choice)
        given["parallel_tool_calls"] = not body.tool_choice.disable_parallel_tool_use
    if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        given["continue_final_message"] = True  # what Anthropic calls a prefilled answer
    if isinstance(body, MessagesBody):
        given |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences, "stream": body.stream,
                  "temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k,
                  "response_format": _form(body)}
    return validated(ChatBody, given, "messages")


def _form(body: MessagesBody) -> dict[str, Any] | None:
    form = (body.output_config.format if body.output_config else None) or body.output_format
    return {"type": "json_schema", "json_schema": {"schema": form.schema_}} if form else None


def _system(body: CountBody) -> list[dict[str, Any]]:
    if not body.system:
        return []
    text = body.system if isinstance(body.system, str) else "\n\n".join(block.text for block in body.system)
    return [{"role": "system", "content": text}]


def _messages(message: AnthropicMessage) -> list[dict[str, Any]]:
    """One message may become several: what tools gave comes first, each result by itself."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results = [_result(block) for block in message.content if isinstance(block, ToolResultBlock)]
    calls = [_call(block) for block in message.content if isinstance(block, ToolUseBlock)]
    rest = [block for block in message.content if isinstance(block, TextBlock | ImageBlock)]
    if not (results or calls or rest) and not any(isinstance(block, ThinkingBlock) for block in message.content):
        raise wrong("a message has no content", "messages")
    if calls:
        text = "".join(block.text for block in rest if isinstance(block, TextBlock))
        return [*results, {"role": "assistant", "content": text or None, "tool_calls": calls}]
    if not rest and results:
        return results
    return [*results, {"role": message.role, "content": _content(rest) or ""}]


def _content(blocks: list[TextBlock | ImageBlock]) -> Any:
    if all(isinstance(block, TextBlock) for block in blocks):
        return "".join(block.text for block in blocks if isinstance(block, TextBlock))
    return [{"type": "text", "text": block.text} if isinstance(block, TextBlock) else _image(block) for block in blocks]


def _image(block: ImageBlock) -> dict[str, Any]:
    source = block.source
    if source.type == "url":
        url = source.url or ""
    else:
        url = f"data:{source.media_type or 'image/png'};base64,{source.data or ''}"
    return {"type": "image_url", "image_url": {"url": url}}


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _result(block: ToolResultBlock) -> dict[str, Any]:
    content = block.content or ""
    told = content if isinstance(content, str) else _content(list(content))
    if block.is_error and isinstance(told, str):
        told = f"Error: {told}"
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": told}


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name or ""}}
    return _CHOICES[choice.type]
