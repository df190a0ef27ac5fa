"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...scheduler import Delta
from ..answering import answer, check_body
from ..choices import Choice
from ..errors import ApiError
from ..events import DONE, event, openai_failure
from ..generation_plan import Plan, plan_chat
from ..logprobs import chat_logprobs, prompt_logprobs
from ..parsing import ParsedRoute
from ..parts import CallStart, Part, TextPart
from ..protocol.chat import ChatBody
from ..runs import Run
from ..serving import Serving
from ..usage import openai_usage
from .described import ERRORS


def chat_routes(serving: Serving) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["chat"], responses=ERRORS, route_class=ParsedRoute)

    @router.post("/v1/chat/completions", summary="An answer to a chat")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        headers = check_body(serving, body)
        plan = await plan_chat(serving, request.scope, body)
        return await answer(serving, request.scope, [plan.request],
                            lambda runs: _Reply(serving.model, body, plan, runs[0]), stream=body.stream,
                            headers=headers)

    return router


@dataclass
class _Reply:
    """The reply to one chat."""

    model: str
    body: ChatBody
    plan: Plan
    run: Run
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.choices = [Choice(index, self.plan.parser()) for index in range(self.plan.request.choices)]

    # -- whole ---------------------------------------------------------------------------------------------------

    async def whole(self) -> dict[str, Any]:
        """The reply in one piece."""
        async for delta in self.run:
            self.choices[delta.choice].feed(delta)
        reply = {"id": self.id, "object": "chat.completion", "created": self.created, "model": self.model,
                 "choices": [self._choice(choice) for choice in self.choices],
                 "usage": openai_usage([self.run.usage])}
        if self.body.prompt_logprobs is not None:
            reply["prompt_logprobs"] = prompt_logprobs(self.run.answer.prompt_logprobs)
        if self.body.return_token_ids:
            reply["prompt_token_ids"] = self.plan.request.prompt.token_ids
        return reply

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": [call.to_openai() for call in choice.calls]}
        found = {"index": choice.index, "message": message, "logprobs": self._logprobs(choice.logprobs),
                 "finish_reason": choice.finish, "stop_reason": choice.stop_reason}
        return found | ({"token_ids": choice.token_ids} if self.body.return_token_ids else {})

    def _logprobs(self, entries: Any) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(entries, as_ids=bool(self.body.return_tokens_as_token_ids))

    # -- streamed ------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The reply as events."""
        for choice in self.choices:
            yield self._chunk(choice, {"role": "assistant", "content": ""}, **self._prompt_ids())
        async for delta in self.run:
            choice = self.choices[delta.choice]
            for part in self._grown(choice, delta):
                yield part
            if choice.finish:
                yield self._chunk(choice, {}, finish_reason=choice.finish, stop_reason=choice.stop_reason)
        if self._options and self._options.include_usage:
            yield event(self._envelope([]) | {"usage": openai_usage([self.run.usage])})
        yield DONE

    def failure(self, error: ApiError) -> bytes:
        """How its stream ends where it failed."""
        return openai_failure(error)

    def _grown(self, choice: Choice, delta: Delta) -> list[bytes]:
        """Events of what an answer has grown by; log-probabilities and ids go with the first."""
        contents = [_content(part) for part in choice.feed(delta)]
        extra: dict[str, Any] = {"logprobs": self._logprobs(delta.logprobs)} if delta.logprobs else {}
        if self.body.return_token_ids and delta.token_ids:
            extra["token_ids"] = list(delta.token_ids)
        if extra and not contents:
            contents = [{"content": ""}]
        return [self._chunk(choice, content, **({} if place else extra)) for place, content in enumerate(contents)]

    def _chunk(self, choice: Choice, delta: dict[str, Any], **extra: Any) -> bytes:
        outside = {"prompt_token_ids": extra.pop("prompt_token_ids")} if "prompt_token_ids" in extra else {}
        told = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None} | extra
        return event(self._envelope([told]) | outside)

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk: dict[str, Any] = {"id": self.id, "object": "chat.completion.chunk", "created": self.created,
                                 "model": self.model, "choices": choices}
        if self._options and self._options.include_usage:
            chunk["usage"] = openai_usage([self.run.usage]) if self._options.continuous_usage_stats else None
        return chunk

    @property
    def _options(self) -> Any:
        return self.body.stream_options

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.plan.request.prompt.token_ids} if self.body.return_token_ids else {}


def _content(part: Part) -> dict[str, Any]:
    """The ``delta`` of a part: a call's id and name come once, then pieces of its arguments."""
    if isinstance(part, TextPart):
        return {"content": part.text}
    if isinstance(part, CallStart):
        function = {"name": part.name, "arguments": ""}
        return {"tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": function}]}
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.fragment}}]}
