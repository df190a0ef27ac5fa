"""``POST /v1/responses``: OpenAI's newer API, without a memory."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...scheduler import Delta
from ..answering import answer, check_body
from ..choices import Choice
from ..errors import ApiError
from ..events import event
from ..from_responses import chat_body
from ..generation_plan import plan_chat
from ..parsing import ParsedRoute
from ..parts import CallArguments, CallStart, Part
from ..protocol.responses import ResponsesBody
from ..response_items import CallItem, TextItem
from ..runs import Run
from ..serving import Serving
from ..usage import responses_usage
from .described import ERRORS


def response_routes(serving: Serving) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["responses"], responses=ERRORS, route_class=ParsedRoute)

    @router.post("/v1/responses", summary="A response; nothing is kept")
    async def responses(request: Request, body: ResponsesBody) -> Response:
        headers = check_body(serving, body)
        plan = await plan_chat(serving, request.scope, chat_body(body))
        choice = Choice(0, plan.parser())
        return await answer(serving, request.scope, [plan.request],
                            lambda runs: _Reply(serving.model, body, runs[0], choice), stream=body.stream,
                            headers=headers)

    return router


class _Reply:
    """The reply to one request: items, of which one grows at a time."""

    def __init__(self, model: str, body: ResponsesBody, run: Run, choice: Choice) -> None:
        self._body, self._run, self._choice = body, run, choice
        self._head = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()),
                      "model": model}
        self._items: list[TextItem | CallItem] = []
        self._number = -1

    async def whole(self) -> dict[str, Any]:
        """The reply in one piece."""
        async for delta in self._run:
            self._grow(delta)
        self._close()
        return self._response(self._status)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The reply as events."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress"))
        async for delta in self._run:
            for kind, values in self._grow(delta):
                yield self._event(kind, **values)
        for kind, values in self._close():
            yield self._event(kind, **values)
        yield self._event(f"response.{self._status}", response=self._response(self._status))

    def failure(self, error: ApiError) -> bytes:
        """How a stream ends that failed."""
        failed = self._response("failed") | {"error": {"code": "server_error", "message": error.message}}
        return self._event("response.failed", response=failed)

    @property
    def _status(self) -> str:
        return "incomplete" if self._choice.finish == "length" else "completed"

    # -- items ---------------------------------------------------------------------------------------------------

    def _grow(self, delta: Delta) -> list[tuple[str, dict[str, Any]]]:
        """Events of what the answer has grown by."""
        told = [found for part in self._choice.feed(delta) for found in self._add(part)]
        if delta.logprobs and self._items and isinstance(self._items[-1], TextItem):
            self._items[-1].logprobs += delta.logprobs
        return told

    def _add(self, part: Part) -> list[tuple[str, dict[str, Any]]]:
        last = self._items[-1] if self._items else None
        if isinstance(part, CallArguments):
            assert isinstance(last, CallItem), "arguments follow the beginning of their call"
            return [last.grow(part.fragment)]
        if isinstance(part, CallStart):
            return [*self._close(), *self._begin(CallItem(len(self._items), part.id, part.name))]
        if isinstance(last, TextItem):
            return [last.grow(part.text)]
        fresh = TextItem(len(self._items))
        return [*self._close(), *self._begin(fresh), fresh.grow(part.text)]

    def _begin(self, item: TextItem | CallItem) -> list[tuple[str, dict[str, Any]]]:
        self._items.append(item)
        return item.begin()

    def _close(self) -> list[tuple[str, dict[str, Any]]]:
        """Events of the end of the item that grew last."""
        if not self._items or self._items[-1].status != "in_progress":
            return []
        return self._items[-1].end("incomplete" if self._choice.finish == "length" else "completed")

    # -- response ------------------------------------------------------------------------------------------------

    def _response(self, status: str) -> dict[str, Any]:
        body = self._body
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        ended = status in ("completed", "incomplete")
        return self._head | {
            "status": status, "output": [item.told() for item in self._items], "error": None,
            "incomplete_details": incomplete, "usage": responses_usage(self._run.usage) if ended else None,
            "instructions": body.instructions, "metadata": body.metadata or {}, "store": False,
            "max_output_tokens": body.max_output_tokens, "temperature": self._run.request.sampling.temperature,
            "top_p": self._run.request.sampling.top_p, "parallel_tool_calls": body.parallel_tool_calls is not False,
            "tool_choice": _plain(body.tool_choice) or "auto", "tools": [_plain(tool) for tool in body.tools or []],
            "text": _plain(body.text) or {"format": {"type": "text"}}, "previous_response_id": None,
            "truncation": "disabled", "background": False}

    def _event(self, kind: str, **values: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **values}, kind)


def _plain(value: Any) -> Any:
    return value.model_dump(by_alias=True) if hasattr(value, "model_dump") else value
