"""``POST /v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's API, with its own events and errors."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..answering import answer, check_body
from ..choices import Call, Choice
from ..errors import ApiError
from ..events import event
from ..from_anthropic import chat_body
from ..generation_plan import offered_tools, plan_chat
from ..parsing import ParsedRoute
from ..parts import CallArguments, CallStart, Part, TextPart
from ..prompts import chat_prompt
from ..protocol.messages import CountBody, MessagesBody
from ..replies import JsonReply
from ..runs import Run
from ..serving import Serving
from ..usage import anthropic_usage
from .described import ANTHROPIC_ERRORS


def message_routes(serving: Serving) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["messages"], responses=ANTHROPIC_ERRORS, route_class=ParsedRoute)

    @router.post("/v1/messages", summary="An answer to a chat, in Anthropic's form")
    async def messages(request: Request, body: MessagesBody) -> Response:
        headers = check_body(serving, body)
        plan = await plan_chat(serving, request.scope, chat_body(body))
        choice = Choice(0, plan.parser())
        return await answer(serving, request.scope, [plan.request], lambda runs: _Reply(body.model, runs[0], choice),
                            stream=body.stream, headers=headers)

    @router.post("/v1/messages/count_tokens", summary="Tokens of a chat, in Anthropic's form")
    async def count_tokens(body: CountBody) -> JsonReply:
        headers = check_body(serving, body)
        chat = chat_body(body)
        prompt = await chat_prompt(serving, chat, offered_tools(chat))
        return JsonReply({"input_tokens": len(prompt.token_ids)}, headers=headers)

    return router


class _Reply:
    """The reply to one request."""

    def __init__(self, model: str, run: Run, choice: Choice) -> None:
        self._run, self._choice = run, choice
        self._head: dict[str, Any] = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant",
                                      "model": model}
        self._block = -1
        self._open: str | None = None

    async def whole(self) -> dict[str, Any]:
        """The reply in one piece."""
        async for delta in self._run:
            self._choice.feed(delta)
        choice = self._choice
        text = [{"type": "text", "text": choice.text}] if choice.text or not choice.calls else []
        calls = [block for call in choice.calls if (block := _tool_use(call))]
        return self._head | {"content": [*text, *calls], **self._ending(), "usage": anthropic_usage(self._run.usage)}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The reply as events: every block begins, grows and ends, one after the other."""
        begin = self._head | {"content": [], "stop_reason": None, "stop_sequence": None,
                              "usage": anthropic_usage(self._run.usage)}
        yield _named("message_start", message=begin)
        async for delta in self._run:
            for part in self._choice.feed(delta):
                for told in self._grown(part):
                    yield told
        if self._open:
            yield self._end()
        yield _named("message_delta", delta=self._ending(), usage=anthropic_usage(self._run.usage))
        yield _named("message_stop")

    def failure(self, error: ApiError) -> bytes:
        """How its stream ends where it failed."""
        return event(error.anthropic_body(), "error")

    def _grown(self, part: Part) -> list[bytes]:
        if isinstance(part, CallStart):
            block = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
            return [*([self._end()] if self._open else []), self._begin("tool_use", block)]
        if isinstance(part, CallArguments):
            return [self._delta({"type": "input_json_delta", "partial_json": part.fragment})]
        assert isinstance(part, TextPart)
        told = [] if self._open != "tool_use" else [self._end()]
        if self._open is None:
            told.append(self._begin("text", {"type": "text", "text": ""}))
        return [*told, self._delta({"type": "text_delta", "text": part.text})]

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        self._block, self._open = self._block + 1, kind
        return _named("content_block_start", index=self._block, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _named("content_block_delta", index=self._block, delta=delta)

    def _end(self) -> bytes:
        self._open = None
        return _named("content_block_stop", index=self._block)

    def _ending(self) -> dict[str, Any]:
        choice = self._choice
        reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(choice.finish or "", "end_turn")
        if isinstance(choice.stop_reason, str) and reason == "end_turn":
            return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
        return {"stop_reason": reason, "stop_sequence": None}


def _tool_use(call: Call) -> dict[str, Any] | None:
    """The block of a call, None of one that was cut off: its input would be no object."""
    try:
        return {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
    except ValueError:
        return None


def _named(kind: str, **values: Any) -> bytes:
    return event({"type": kind, **values}, kind)
