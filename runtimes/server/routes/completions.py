"""``POST /v1/completions``: texts that the model continues, several in one request."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Scope

from ...generation import TokenLogprob
from ...scheduler import Delta, GenerationRequest
from ..answering import answer, check_body
from ..choices import Choice
from ..errors import ApiError, wrong
from ..events import DONE, event, openai_failure
from ..generation_plan import constraint_of, request_of
from ..logprobs import CompletionLogprobs, prompt_logprobs
from ..parsing import ParsedRoute
from ..prompts import kept_tokens, on_thread, text_prompt
from ..protocol.common import MOST_CHOICES
from ..protocol.completions import MOST_PROMPTS, CompletionBody
from ..records import record_of
from ..runs import Run, merged
from ..serving import Serving
from ..usage import openai_usage
from .described import ERRORS


def completion_routes(serving: Serving) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["completions"], responses=ERRORS, route_class=ParsedRoute)

    @router.post("/v1/completions", summary="What follows a text")
    async def completions(request: Request, body: CompletionBody) -> Response:
        headers = check_body(serving, body)
        planned = await _plan(serving, request.scope, body)
        echoed = await _echoed(serving, body, planned)
        return await answer(serving, request.scope, planned, lambda runs: _Reply(serving, body, runs, echoed),
                            stream=body.stream, headers=headers)

    return router


def _prompts(body: CompletionBody) -> list[str | list[int]]:
    """The prompts of a request, one by one."""
    prompt: Any = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) * (body.n or 1) > MOST_PROMPTS * 4 or (body.n or 1) > MOST_CHOICES:
        raise wrong(f"{len(prompt)} prompts with {body.n} answers each are too many", "prompt")
    return list(prompt)


async def _plan(serving: Serving, scope: Scope, body: CompletionBody) -> list[GenerationRequest]:
    """One request per prompt."""
    if body.max_tokens == 0 and not body.echo:
        raise wrong("max_tokens is 0, so that nothing is said: only echo makes sense of it", "max_tokens")
    if body.stream and body.prompt_logprobs is not None:
        raise wrong("prompt_logprobs are not streamed: leave out stream", "prompt_logprobs")
    echoed = body.logprobs if body.echo else None
    keep = kept_tokens(serving, body.truncate_prompt_tokens, body.max_tokens)
    planned = []
    for text in _prompts(body):
        prompt = await text_prompt(serving, text, begins=body.add_special_tokens is not False, keep=keep)
        constraint = await constraint_of(serving, body)
        planned.append(await request_of(serving, scope, body, prompt, body.max_tokens, body.logprobs,
                                        constraint=constraint, prompt_logprobs=echoed))
    if len(planned) > 1:  # one id for the log, another for each at the service
        planned = [replace(one, request_id=f"{one.request_id}-{place}") for place, one in enumerate(planned)]
    record_of(scope).choices = len(planned) * (body.n or 1)
    return planned


async def _echoed(serving: Serving, body: CompletionBody, planned: list[GenerationRequest]) -> list[str]:
    """The texts that stand before the answers, one per prompt."""
    if not body.echo:
        return ["" for _ in planned]
    decode = serving.processor.tokenizer.decode
    return await on_thread(serving, lambda: [decode(one.prompt.token_ids) for one in planned])


@dataclass
class _Reply:
    """The reply to one request."""

    serving: Serving
    body: CompletionBody
    runs: list[Run]
    echoed: list[str]
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.answers = self.body.n or 1
        count = len(self.runs) * self.answers
        self.choices = [Choice(index) for index in range(count)]
        self._tellers = [CompletionLogprobs(as_ids=bool(self.body.return_tokens_as_token_ids)) for _ in range(count)]

    def _choice_of(self, number: int, delta: Delta) -> Choice:
        """Grow the answer that a delta belongs to; only its end counts where no token was asked for."""
        choice = self.choices[number * self.answers + delta.choice]
        if self.body.max_tokens == 0:
            delta = Delta(delta.choice, finish_reason=delta.finish_reason and "length")
        choice.feed(delta)
        return choice

    # -- whole ---------------------------------------------------------------------------------------------------

    async def whole(self) -> dict[str, Any]:
        """The reply in one piece."""
        async for number, delta in merged(self.runs):
            self._choice_of(number, delta)
        return self._envelope([self._told(choice) for choice in self.choices]) | {
            "usage": openai_usage(run.usage for run in self.runs)}

    def _told(self, choice: Choice) -> dict[str, Any]:
        number = choice.index // self.answers
        told = {"index": choice.index, "text": self.echoed[number] + choice.text,
                "logprobs": self._logprobs(choice, [*self._prompt_entries(number), *choice.logprobs]),
                "finish_reason": choice.finish, "stop_reason": choice.stop_reason}
        run = self.runs[number]
        if self.body.return_token_ids:
            told |= {"token_ids": choice.token_ids, "prompt_token_ids": run.request.prompt.token_ids}
        if self.body.prompt_logprobs is not None:
            told["prompt_logprobs"] = prompt_logprobs(run.answer.prompt_logprobs)
        return told

    def _prompt_entries(self, number: int) -> list[TokenLogprob | None]:
        """Log-probabilities of a prompt that is repeated."""
        wanted = self.body.echo and self.body.logprobs is not None
        return list(self.runs[number].answer.prompt_logprobs) if wanted else []

    def _logprobs(self, choice: Choice, entries: list[TokenLogprob | None]) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        ids = self.runs[choice.index // self.answers].request.prompt.token_ids
        begins = bool(entries) and entries[0] is None
        first = self.serving.processor.tokenizer.decode(ids[:1], skip_special=False) if begins else ""
        return self._tellers[choice.index].of(entries, first)

    # -- streamed ------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The reply as events."""
        begun = set[int]()
        async for number, delta in merged(self.runs):
            choice = self._choice_of(number, delta)
            text = "" if self.body.max_tokens == 0 else delta.text
            entries: list[TokenLogprob | None] = [] if self.body.max_tokens == 0 else list(delta.logprobs)
            told = self._extra(choice, delta)
            if choice.index not in begun:
                begun.add(choice.index)
                text, entries = self.echoed[number] + text, [*self._prompt_entries(number), *entries]
            if text or entries or told or choice.finish:
                yield self._chunk(choice, text, self._logprobs(choice, entries) if entries else None, told)
        if self._options and self._options.include_usage:
            yield event(self._envelope([]) | {"usage": openai_usage(run.usage for run in self.runs)})
        yield DONE

    def failure(self, error: ApiError) -> bytes:
        """How its stream ends where it failed."""
        return openai_failure(error)

    def _extra(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        wanted = self.body.return_token_ids and delta.token_ids
        return {"token_ids": list(delta.token_ids)} if wanted else {}

    def _chunk(self, choice: Choice, text: str, logprobs: Any, extra: dict[str, Any]) -> bytes:
        told = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish,
                "stop_reason": choice.stop_reason}
        chunk = self._envelope([told | extra])
        if self._options and self._options.include_usage:
            continuous = self._options.continuous_usage_stats
            chunk["usage"] = openai_usage(run.usage for run in self.runs) if continuous else None
        return event(chunk)

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.serving.model,
                "choices": choices}

    @property
    def _options(self) -> Any:
        return self.body.stream_options
