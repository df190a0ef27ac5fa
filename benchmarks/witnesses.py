"""Well-behaved clients beside an abuse: what they hear must not change, nor how fast.

Their questions are asked alone first. Whatever goes on later, the same question has the same greedy answer. They run
in a process of their own, so that the work of abusing is not in their times.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import httpx
import numpy as np

from herdgraph.errors import HerdError

WITNESSES = 3
_SUBJECTS = ("a calf", "the river", "two numbers", "a letter home", "rain", "an old clock", "the market", "bees")

Body = dict[str, Any]


# -- questions -------------------------------------------------------------------------------------------------------


def questions(count: int, tokens: int = 48) -> list[Body]:
    """Chats with short and longer prompts, all different, whose answers have a fixed length."""
    asked = []
    for number in range(count):
        told = f"Tell me about {_SUBJECTS[number % len(_SUBJECTS)]}, {number} times. " * (1 + number * 7 % 30)
        asked.append({"messages": [{"role": "user", "content": told}], "max_tokens": tokens, "temperature": 0,
                      "ignore_eos": True, "stream": number % 4 != 3})
    return asked


@dataclass
class Heard:
    """What became of a question.

    Attributes:
        status: of HTTP, 0 where there was none.
        text: the answer.
        whole: whether it came to its end.
        events: when each of its texts came.
        failure: the error that came in its place, or ended it.
        retry_after: seconds that the server asked to wait, of a reply that is no answer.
    """

    status: int = 0
    text: str = ""
    whole: bool = False
    events: list[float] = field(default_factory=list)
    failure: str = ""
    retry_after: str = ""


async def ask(client: httpx.AsyncClient, body: Body) -> Heard:
    """One question to the chat, streamed or not."""
    heard = Heard()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            heard.status, heard.retry_after = response.status_code, response.headers.get("retry-after", "")
            if body.get("stream") and heard.status == httpx.codes.OK:
                async for line in response.aiter_lines():
                    _note(heard, line)
            else:
                _note_whole(heard, json.loads(await response.aread()))
    except (httpx.HTTPError, ValueError) as error:
        heard.failure = heard.failure or repr(error)
    return heard


def _note_whole(heard: Heard, reply: Body) -> None:
    if heard.status != httpx.codes.OK:
        heard.failure = reply["error"]["message"]
        return
    heard.text, heard.whole = reply["choices"][0]["message"]["content"], True


def _note(heard: Heard, line: str) -> None:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    told = json.loads(line[6:])
    if "error" in told:
        heard.failure = told["error"]["message"]
    for choice in told.get("choices", ()):
        heard.whole = heard.whole or choice["finish_reason"] is not None
        if text := choice["delta"].get("content"):
            heard.text += text
            heard.events.append(time.perf_counter())


def client_of(url: str) -> httpx.AsyncClient:
    """A client that waits long, with as many connections as it likes."""
    return httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None))


async def solo(url: str, asked: Sequence[Body]) -> list[str]:
    """The answers, one after the other."""
    async with client_of(url) as client:
        heard = [await ask(client, body) for body in asked]
    if missing := [one for one in heard if not one.whole]:
        raise HerdError(f"a question has no answer when it is asked alone: {missing[0]}")
    return [one.text for one in heard]


# -- beside the abuse ------------------------------------------------------------------------------------------------


@dataclass
class Testimony:
    """What witnesses heard in some time.

    Attributes:
        answers: that came.
        wrong: that were not as they are alone, or broke off.
        gaps: seconds between tokens of one answer.
    """

    answers: int = 0
    wrong: int = 0
    gaps: list[float] = field(default_factory=list)

    def gap(self, percent: float) -> float:
        """A percentile of the milliseconds between tokens; 0 where there were none."""
        return 1000 * float(np.percentile(self.gaps, percent)) if self.gaps else 0.0


@contextmanager
def watching(url: str, asked: Sequence[Body], alone: Sequence[str]) -> Iterator[Testimony]:
    """Witnesses for as long as the block runs; the testimony is complete after it."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(theirs, url, asked, alone), daemon=True)
    process.start()
    testimony = Testimony()
    ours.recv()  # they have begun
    try:
        yield testimony
    finally:
        ours.send(None)
        testimony.__dict__.update(ours.recv().__dict__)
        process.join()


def _run(pipe: Connection, url: str, asked: Sequence[Body], alone: Sequence[str]) -> None:
    pipe.send(None)
    pipe.send(asyncio.run(_testify(pipe, url, asked, alone)))


async def _testify(pipe: Connection, url: str, asked: Sequence[Body], alone: Sequence[str]) -> Testimony:
    testimony = Testimony()

    async def witness(number: int) -> None:
        place = number
        async with client_of(url) as client:
            while not pipe.poll():
                place = (place + WITNESSES) % len(asked)
                heard = await ask(client, asked[place])
                if heard.status == httpx.codes.SERVICE_UNAVAILABLE:
                    await asyncio.sleep(1)
                    continue
                testimony.answers += 1
                testimony.wrong += not heard.whole or heard.text != alone[place]
                testimony.gaps += list(np.diff(heard.events))

    await asyncio.gather(*(witness(number) for number in range(WITNESSES)))
    return testimony
