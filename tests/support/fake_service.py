"""A service that says what it is told to, for tests of the server: no model, no thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from herdgraph.errors import HerdError
from herdgraph.model.config.presets import TINY
from herdgraph.model.processing import PromptProcessor
from herdgraph.runtimes.generation import TokenLogprob
from herdgraph.runtimes.generation.sampling import Candidate
from herdgraph.runtimes.scheduler import Delta, GenerationRequest, OverloadedError, Usage
from support import herds

STOP = 508
"""The end-of-turn token of TINY's vocabulary."""


@dataclass
class FakeEngine:
    """Tokenizer and configuration of TINY."""

    processor: PromptProcessor
    config: object = TINY

    @classmethod
    def in_directory(cls, directory: Path) -> FakeEngine:
        """Write the tokenizer's files and read them."""
        directory.mkdir(exist_ok=True)
        herds.write_processor(directory)
        return cls(PromptProcessor(directory, TINY))


@dataclass
class FakeService:
    """Says ``script(request, choice)`` to every request, a character at a time.

    Attributes:
        engine: for its tokenizer.
        script: text of an answer.
        delay: seconds before each token.
        full: refuse requests as a full queue does.
        stuck: say nothing, as if queued for ever.
        fails_after: tokens after which an answer fails.
        max_model_len: tokens of a prompt and its answer.
        failure: why it runs no more.
        on_step: is told the tokens of calls; nobody calls it.
        requests: that were submitted.
        answers: to them.
    """

    engine: FakeEngine
    script: Callable[[GenerationRequest, int], str] = lambda _request, choice: ("Hello", "Good day", "Hi")[choice % 3]
    delay: float = 0.0
    full: bool = False
    stuck: bool = False
    fails_after: int | None = None
    max_model_len: int = 4096
    failure: str = ""
    on_step: Callable[[int], None] = lambda tokens: None
    requests: list[GenerationRequest] = field(default_factory=list)
    answers: list[FakeAnswer] = field(default_factory=list)

    def submit(self, request: GenerationRequest) -> FakeAnswer:
        if self.full:
            raise OverloadedError("the queue is full: 256 requests wait", 7.0)
        if len(request.prompt.token_ids) > 4000:
            raise HerdError("the prompt is longer than all cache memory")
        self.requests.append(request)
        self.answers.append(FakeAnswer(self, request))
        return self.answers[-1]

    def gauges(self) -> Mapping[str, float]:
        running = sum(not answer.ended for answer in self.answers)
        return {"running": running, "waiting": 0, "waiting_capacity": 2, "waiting_deferred": 1,
                "kv_cache_usage": 0.25, "prefix_queries": 100, "prefix_hits": 40,
                "mm_queries": 6, "mm_hits": 4, "preemptions": 1, "spec_drafts": 2, "spec_draft_tokens": 8,
                "spec_accepted_tokens": 5, "spec_accepted_at_0": 3, "spec_accepted_at_1": 2}

    def cache_config(self) -> Mapping[str, str]:
        return {"block_size": "64", "num_gpu_blocks": "100"}

    def drain(self, timeout: float) -> None:
        """End what runs."""
        self.drained = timeout


class FakeAnswer:
    """The scripted deltas of one request."""

    def __init__(self, service: FakeService, request: GenerationRequest) -> None:
        self.service, self.request = service, request
        self.usage = Usage(prompt_tokens=len(request.prompt.token_ids), cached_tokens=1, queue_seconds=0.001,
                           first_token_seconds=0.002, total_seconds=0.003)
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.cancelled = self.ended = False
        if request.prompt_logprobs is not None:
            self.prompt_logprobs = [None, *map(self._logprob, request.prompt.token_ids[1:])]

    def cancel(self) -> None:
        self.cancelled = not self.ended
        self.ended = True

    async def __aiter__(self) -> AsyncIterator[Delta]:
        if self.service.stuck:
            await asyncio.Event().wait()
        texts = [self.service.script(self.request, choice) for choice in range(self.request.choices)]
        going = set(range(len(texts)))
        for place in range(max(map(len, texts)) + 1):
            for choice in sorted(going):
                text = texts[choice]
                await asyncio.sleep(self.service.delay)
                if place == self.service.fails_after:
                    yield Delta(choice, finish_reason="error", error="the weights are on fire")
                    return
                delta = self._delta(choice, text, place)
                going -= {choice} if delta.finish_reason else set()
                yield delta
        self.ended = True

    def _delta(self, choice: int, text: str, place: int) -> Delta:
        """The token at a place of a text: a character, or in the end the stop token."""
        most = self.request.stop.max_new_tokens
        self.usage.completion_tokens += 1
        token = STOP if place == len(text) else self.service.engine.processor.tokenizer.encode(text[place])[0]
        logprobs = (self._logprob(token),) if self.request.sampling.logprobs is not None else ()
        if place == len(text):
            return Delta(choice, "", (token,), logprobs, "stop")
        stop = next((stop for stop in self.request.stop.strings if text[: place + 1].endswith(stop)), None)
        reason = "stop" if stop else "length" if place + 1 == most else None
        return Delta(choice, text[place], (token,), logprobs, reason, stop)

    def _logprob(self, token: int) -> TokenLogprob:
        name = self.service.engine.processor.tokenizer.decode([token], skip_special=False)
        others = [Candidate(other, "?", -2.0) for other in (9, 8, 7)]
        top = [Candidate(token, name, -0.5), *others]
        return TokenLogprob(token, name, -0.5, tuple(top[: self.request.sampling.logprobs or 0]))
