"""Chats with a server with OpenAI's API, several at a time, and what came of them: texts, calls, times."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np


@dataclass
class Answered:
    """One answer.

    Attributes:
        status: of HTTP; 0 where the connection broke.
        refusal: the error's message.
        text: its content.
        calls: name and arguments of each call, as they were written.
        finish: why it ended.
        tokens: of the answer.
        prompt_tokens: of the question.
        events: when each event with something new came; empty for an answer in one piece.
    """

    status: int = 0
    refusal: str = ""
    text: str = ""
    calls: list[list[str]] = field(default_factory=list)
    finish: str | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    events: list[float] = field(default_factory=list, repr=False)

    @property
    def per_token(self) -> float:
        """Mean seconds between tokens; an event may hold several, as those of one character do."""
        return (self.events[-1] - self.events[0]) / (self.tokens - 1)


def ask_all(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> list[Answered]:
    """Ask a server; each client asks the next question when its last one is answered.

    Args:
        url: of the server.
        bodies: of ``/v1/chat/completions``, streamed or not.
        clients: that ask at the same time.
    """
    return asyncio.run(_ask_all(url, bodies, clients))


async def _ask_all(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> list[Answered]:
    answers, waiting = [Answered() for _ in bodies], iter(range(len(bodies)))

    async def ask_next(client: httpx.AsyncClient) -> None:
        for place in waiting:
            try:
                await _ask(client, bodies[place], answers[place])
            except httpx.HTTPError as error:
                answers[place] = Answered(refusal=repr(error))

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await asyncio.gather(*(ask_next(client) for _ in range(clients)))
    return answers


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], answer: Answered) -> None:
    usage = {"stream_options": {"include_usage": True}} if body.get("stream") else {}
    async with client.stream("POST", "/v1/chat/completions", json={**body, **usage}) as response:
        answer.status = response.status_code
        if response.status_code != httpx.codes.OK:
            answer.refusal = json.loads(await response.aread())["error"]["message"]
        elif not body.get("stream"):
            _take(answer, json.loads(await response.aread()), "message")
        else:
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _take(answer, json.loads(line[6:]), "delta")


def _take(answer: Answered, reply: dict[str, Any], name: str) -> None:
    """Add a whole reply or an event to an answer."""
    if "error" in reply:
        answer.refusal = reply["error"]["message"]
    if usage := reply.get("usage"):
        answer.tokens, answer.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
    for choice in reply.get("choices", ()):
        answer.finish = choice["finish_reason"] or answer.finish
        text, calls = choice[name].get("content"), choice[name].get("tool_calls") or []
        answer.text += text or ""
        for place, call in enumerate(calls):
            _add_call(answer, call.get("index", place), call["function"])
        if name == "delta" and (text or calls):
            answer.events.append(time.perf_counter())


def _add_call(answer: Answered, index: int, function: dict[str, str]) -> None:
    if index == len(answer.calls):
        answer.calls.append([function["name"], ""])
    answer.calls[index][1] += function["arguments"]


def milliseconds(answers: Sequence[Answered]) -> dict[str, float]:
    """Times of streamed answers: the median answer's per token, and the median and 95th percentile between events."""
    streamed = [answer for answer in answers if len(answer.events) > 1 and answer.tokens > 1]
    if not streamed:
        return {}
    gaps = np.concatenate([np.diff(answer.events) for answer in streamed])
    times = {"per token": np.median([answer.per_token for answer in streamed]),
             "p50": np.percentile(gaps, 50), "p95": np.percentile(gaps, 95)}
    return {name: 1000 * float(value) for name, value in times.items()}
