"""A request while the service works on it: timed, counted, and ended when nobody wants it any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

from starlette.types import Scope

from ..scheduler import Delta, GenerationRequest, Usage
from .errors import ApiError, wrong
from .keys import Key
from .records import Clock, record_of
from .serving import Serving


class Run:
    """One prompt at the service. Use it in a ``with``: leaving it ends the request wherever it is.

    Args:
        serving: has the service.
        scope: of the HTTP request.
        request: the prompt and how it is answered.

    Raises:
        ApiError: on construction: the queue is full, or the request can never run.
    """

    def __init__(self, serving: Serving, scope: Scope, request: GenerationRequest) -> None:
        self._serving, self._record, self.request = serving, record_of(scope), request
        self.key: Key | None = scope.get("herdgraph.key")
        self.answer = serving.submit(request)
        serving.running.add(self)
        self._ended = 0
        self._record.usage.append(self.usage)

    @property
    def usage(self) -> Usage:
        """What it has cost so far."""
        return self.answer.usage

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """The deltas of its answers.

        Raises:
            ApiError: an answer failed.
        """
        clock = Clock(self._record)
        async for delta in self.answer:
            clock.see(delta)
            self._ended += delta.finish_reason is not None
            if delta.finish_reason == "error":
                raise self._failed(delta)
            yield delta

    def _failed(self, delta: Delta) -> ApiError:
        if delta.request_is_wrong:
            return wrong(delta.error)
        if self._serving.phase == "draining":
            return ApiError(503, "the server ended before the answer did", retry_after=10)
        return ApiError(500, delta.error or "the answer failed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if left := self.request.choices - self._ended:
            self._record.finished["abort"] += left
        self.answer.cancel()
        self._serving.running.discard(self)

    def told(self) -> dict[str, Any]:
        """Its numbers for whoever looks what the server does; no texts."""
        usage, request = self.usage, self.request
        return {
            "request_id": request.request_id, "path": self._record.path, "waiting": not usage.queue_seconds,
            "seconds": round(self._record.seconds, 3), "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens, "completion_tokens": usage.completion_tokens,
            "preemptions": usage.preemptions, "n": request.choices, "max_tokens": request.stop.max_new_tokens,
            "priority": request.priority}


async def merged(runs: Sequence[Run]) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas of several prompts as they come, with the number of the prompt."""
    channels = [aiter(run) for run in runs]
    waiting: dict[asyncio.Future[Any], int] = {}
    try:
        for number, channel in enumerate(channels):
            waiting[asyncio.ensure_future(_next(channel))] = number
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                number = waiting.pop(future)
                if (delta := future.result()) is not None:
                    waiting[asyncio.ensure_future(_next(channels[number]))] = number
                    yield number, delta
    finally:
        for future in waiting:
            future.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _next(channel: AsyncIterator[Delta]) -> Delta | None:
    return await anext(channel, None)
