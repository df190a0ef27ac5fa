"""The scheduler in a thread of its own, for servers and for applications with many requests."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from ...errors import HerdError
from ...model.processing import Prompt
from ..engine import Engine
from ..generation import Asked, Generation, Timings
from .active import ActiveRequest
from .answer import Answer, wake
from .request import GenerationRequest, OverloadedError
from .scheduler import Scheduler
from .speculation import Drafter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServiceOptions:
    """Limits of a service.

    Attributes:
        sequences: most answers that are generated at the same time.
        step_tokens: most tokens in one call of the model.
        slowdown: how many times longer than one without prompts a call may take while answers are being read; prompts
            are cut accordingly.
        queued_requests: most requests that wait.
        queued_tokens: most tokens of their prompts.
    """

    sequences: int = 64
    step_tokens: int = 512
    slowdown: float = 2.5
    queued_requests: int = 256
    queued_tokens: int = 1 << 20


class Service:
    """Runs requests on an engine. The thread that it starts is the only one that runs the model.

    Args:
        engine: loaded; closed with the service.
        options: limits.
        drafter: guesses next tokens, None for no speculation.

    Attributes:
        max_model_len: most tokens of a prompt and its answer: the model's context, or what there is memory for.
        failure: why it runs no more; empty while it does.
        on_step: is told the number of tokens of every call of the model, on the thread that made it.
    """

    def __init__(
        self, engine: Engine, options: ServiceOptions | None = None, *, drafter: Drafter | None = None
    ) -> None:
        self.engine, self.options = engine, options or ServiceOptions()
        limits = self.options
        self._scheduler = Scheduler(engine, sequences=limits.sequences, step_tokens=limits.step_tokens,
                                    slowdown=limits.slowdown, drafter=drafter)
        context = engine.config.text.max_position_embeddings
        self.max_model_len = min(context, self._scheduler.room.most_tokens or context)
        self.failure = ""
        self.on_step: Callable[[int], None] = lambda tokens: None
        self._tokenizer = engine.processor.tokenizer if engine.processor.has_tokenizer else None
        self._arrived: deque[ActiveRequest] = deque()
        self._active: dict[Answer, ActiveRequest] = {}
        self._changed = threading.Condition()
        self._draining = self._stopping = False
        self._finished: deque[tuple[float, int]] = deque(maxlen=64)
        self._thread = threading.Thread(target=self._loop, name="herdgraph-scheduler", daemon=True)
        self._thread.start()

    # -- for everybody ---------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return not (self._draining or self._stopping or self.failure)

    def submit(self, request: GenerationRequest) -> Answer:
        """Queue a request.

        Raises:
            OverloadedError: the queue is full, or the service is going down.
            HerdError: the request can never run: it is longer than the context, or than all cache memory.
        """
        self._require_possible(request)
        answer = Answer(request.choices, self._cancel)
        active = ActiveRequest(request, answer, self.engine.config, self._tokenizer,
                               self._scheduler.room.block_tokens)
        with self._changed:
            self._require_open(len(request.prompt.token_ids))
            self._active[answer] = active
            self._arrived.append(active)
            self._changed.notify_all()
        return answer

    async def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """One answer to its end, in an event loop; arguments and errors as in ``Engine.generate``.

        Raises:
            OverloadedError: see ``submit``.
            HerdError: an impossible prompt or option, or a call of the model failed.
        """
        asked = await asyncio.to_thread(Asked.of, self.engine.processor, self.engine.config, prompt, **options)
        answer = self.submit(GenerationRequest(
            request_id="", prompt=asked.prompt, sampling=asked.sampling, stop=asked.stop, never=asked.never))
        result, usage = Generation(), answer.usage
        try:
            async for delta in answer:
                if delta.finish_reason == "error":
                    raise HerdError(delta.error)
                result.text += delta.text
                result.token_ids += delta.token_ids
                result.logprobs += delta.logprobs
                result.finish_reason = delta.finish_reason or result.finish_reason
        finally:
            answer.cancel()
        result.timings = Timings(
            usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens,
            usage.first_token_seconds - usage.queue_seconds, usage.total_seconds - usage.first_token_seconds)
        return result

    def gauges(self) -> dict[str, float]:
        """What goes on: requests running and waiting, memory, and what the prefix cache was asked and had."""
        scheduler, prefixes, guesses = self._scheduler, self._scheduler.prefixes, self._scheduler.speculation
        vision = self.engine.vision
        with self._changed:
            begun = [active.has_begun for active in self._active.values()]
        waiting = len(begun) - sum(begun)
        deferred = min(scheduler.deferred, waiting)
        return {
            "running": sum(begun), "waiting": waiting,
            "waiting_capacity": waiting - deferred, "waiting_deferred": deferred,
            "kv_cache_usage": scheduler.room.used_share, "preemptions": scheduler.preemptions,
            "prefix_queries": prefixes.queried_tokens if prefixes else 0,
            "prefix_hits": prefixes.found_tokens if prefixes else 0,
            "mm_queries": vision.queried if vision else 0, "mm_hits": vision.found if vision else 0,
            "spec_drafts": guesses.drafts if guesses else 0, "spec_draft_tokens": guesses.guessed if guesses else 0,
            "spec_accepted_tokens": guesses.held if guesses else 0,
            **{f"spec_accepted_at_{place}": count for place, count in enumerate(guesses.held_at if guesses else ())},
        }

    def cache_config(self) -> dict[str, str]:
        """The memory of keys and values under vLLM's names; nothing where sequences have buffers of their own."""
        return self._scheduler.room.config()

    def drain(self, timeout: float) -> None:
        """Take no more requests, and wait until those that are there have ended; after ``timeout`` end them."""
        until = time.monotonic() + timeout
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: not self._active, max(0.0, until - time.monotonic()))
            for active in self._active.values():
                active.cancelled = True

    def close(self) -> None:
        """End everything that runs, and the engine."""
        self.drain(0)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- at the door -----------------------------------------------------------------------------------------------

    def _require_possible(self, request: GenerationRequest) -> None:
        tokens, most = len(request.prompt.token_ids), self.max_model_len
        if not tokens:
            raise HerdError("the prompt is empty: give at least one token")
        if tokens + request.stop.max_new_tokens > most:
            raise HerdError(f"the prompt has {tokens} tokens and {request.stop.max_new_tokens} are asked for, at most "
                            f"{most} fit together: shorten one of them")
        if request.choices > self.options.sequences:
            raise HerdError(f"{request.choices} answers are asked for, at most {self.options.sequences} are generated "
                            "at the same time")

    def _require_open(self, tokens: int) -> None:
        limits = self.options
        if self.failure:
            raise OverloadedError(f"the engine runs no more: {self.failure}", 30.0)
        if self._draining or self._stopping:
            raise OverloadedError("the server is going down: ask another one", 5.0)
        waiting = [active for active in self._active.values() if not active.has_begun]
        queued = sum(len(active.request.prompt.token_ids) for active in waiting)
        if len(waiting) >= limits.queued_requests or (waiting and queued + tokens > limits.queued_tokens):
            raise OverloadedError(f"{len(waiting)} requests with {queued} tokens are waiting, at most "
                                  f"{limits.queued_requests} and {limits.queued_tokens} are queued", self._wait())

    def _wait(self) -> float:
        """Seconds until about one request has ended, by those that ended last."""
        if len(self._finished) < 2:
            return 5.0
        spent = self._finished[-1][0] - self._finished[0][0]
        return min(60.0, max(1.0, spent / (len(self._finished) - 1)))

    def _cancel(self, answer: Answer) -> None:
        with self._changed:
            if (active := self._active.get(answer)) is not None:
                active.cancelled = True
                self._changed.notify_all()

    # -- the thread ------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while self._take_arrived():
            try:
                if tokens := self._scheduler.step():
                    self.on_step(tokens)
            except Exception as error:
                self._fail(error)
            self._tell()

    def _take_arrived(self) -> bool:
        """Wait for something to do; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._scheduler.has_work or self._stopping)
            while self._arrived:
                self._scheduler.add(self._arrived.popleft())
            return self._scheduler.has_work or not self._stopping

    def _tell(self) -> None:
        """Wake readers, and forget what has ended."""
        with self._changed:
            wake(self._active)
            for answer, active in list(self._active.items()):
                if active.is_over:
                    del self._active[answer]
                    self._finished.append((time.monotonic(), answer.usage.completion_tokens))
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        """End all requests after a call that failed; where the engine is closed, for good."""
        logger.error("a call of the model failed: %s", error, exc_info=not isinstance(error, HerdError))
        for active in self._scheduler.requests:
            self._scheduler.fail(active, f"a call of the model failed: {error}")
        self.failure = self.engine.closed
