"""Clients of a server with OpenAI's API, and what they see: time to the first token, time between tokens, tokens/s.

Everybody streams ``/v1/completions`` with token ids, so that any server gets exactly the same prompts, and asks for the
next answer when one has ended. The time of an answer's first event is its time to the first token (TTFT), the gaps
between its events are the inter-token latencies (ITL); tokens are counted by the server's own usage.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        prompt: token ids.
        tokens: of the answer; it does not end before.
        delay: seconds to wait before it is asked.
    """

    prompt: Sequence[int]
    tokens: int
    delay: float = 0.0


@dataclass
class Seen:
    """What a client saw of one answer.

    Attributes:
        asked: when it was asked.
        events: when each event with text came.
        tokens: of the answer.
        cached: tokens of the prompt that were not computed.
        text: the answer.
        failure: why there is none.
    """

    asked: float
    events: list[float] = field(default_factory=list)
    tokens: int = 0
    cached: int = 0
    text: str = ""
    failure: str = ""

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.events[0] - self.asked if self.events else float("nan")

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return list(np.diff(self.events))


@dataclass(frozen=True)
class Load:
    """What many clients saw.

    Attributes:
        seen: every answer.
        seconds: from the first question to the last answer.
    """

    seen: list[Seen]
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens of answers per second."""
        return sum(one.tokens for one in self.seen) / self.seconds

    def first(self, percent: float) -> float:
        """A percentile of the seconds to the first token, of those who got one."""
        return float(np.nanpercentile([one.first for one in self.seen], percent))

    def gap(self, percent: float) -> float:
        """A percentile of the seconds between tokens."""
        return float(np.percentile([gap for one in self.seen for gap in one.gaps], percent))

    @property
    def failures(self) -> list[str]:
        """Why answers are missing."""
        return [one.failure for one in self.seen if one.failure]


async def _ask(client: httpx.AsyncClient, model: str, question: Question) -> Seen:
    await asyncio.sleep(question.delay)
    seen = Seen(time.perf_counter())
    body = {"model": model, "prompt": list(question.prompt), "max_tokens": question.tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                seen.failure = f"{response.status_code} {(await response.aread()).decode()[:200]}"
                return seen
            async for line in response.aiter_lines():
                _note(seen, line)
    except httpx.HTTPError as error:
        seen.failure = repr(error)
    return seen


def _note(seen: Seen, line: str) -> None:
    """Take one line of a stream."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    now, event = time.perf_counter(), json.loads(line[6:])
    if event.get("usage"):
        usage = event["usage"]
        seen.tokens = usage["completion_tokens"]
        seen.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    for choice in event.get("choices", ()):
        seen.text += choice.get("text") or ""
        if choice.get("finish_reason") is None or choice.get("text"):
            seen.events.append(now)


async def _client(client: httpx.AsyncClient, model: str, questions: Iterable[Question]) -> list[Seen]:
    return [await _ask(client, model, question) for question in questions]


async def _all(url: str, clients: Sequence[Sequence[Question]]) -> Load:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        started = time.perf_counter()
        answers = await asyncio.gather(*(_client(client, model, questions) for questions in clients))
        return Load([seen for one in answers for seen in one], time.perf_counter() - started)


def load(url: str, clients: Sequence[Sequence[Question]]) -> Load:
    """Let clients ask at the same time, each one question after the other.

    Args:
        url: of the server.
        clients: the questions of each.
    """
    return asyncio.run(_all(url, clients))
