"""More requests than a server takes, and its end under load: whoever was taken is answered, others are told."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter

import httpx

from .abused_server import Target
from .strangers import Count
from .witnesses import Heard, ask, client_of, questions, solo


async def full_queue(target: Target, count: int) -> Count:
    """More requests than run and wait: some are refused and told when to come again, all others are answered."""
    asked = questions(16, 24)
    alone = await solo(target.url, asked)
    async with client_of(target.url) as client:
        heard = await asyncio.gather(*(ask(client, asked[number % 16]) for number in range(count)))
    return Counter(_fate(one, alone[number % 16]) for number, one in enumerate(heard))


def _fate(heard: Heard, right: str) -> str:
    if heard.whole:
        return "200" if heard.text == right else "200: wrong answer"
    if heard.status == httpx.codes.SERVICE_UNAVAILABLE:
        return "503" if heard.retry_after else "503 without Retry-After"
    if heard.status == httpx.codes.OK and "the server ended" in heard.failure:
        return "error event"
    return f"lost: {heard.status} {heard.failure[:100]}"


async def _ended(target: Target, count: int, tokens: int) -> Count:
    asked = questions(16, tokens)
    alone = await solo(target.url, asked)
    async with client_of(target.url) as client:
        running = [asyncio.ensure_future(ask(client, asked[number % 16])) for number in range(count)]
        await _arrived(target, count)
        target.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        late = await ask(client, asked[0])
        heard = await asyncio.gather(*running)
    fates = Counter(_fate(one, alone[number % 16]) for number, one in enumerate(heard))
    status = await asyncio.to_thread(target.process.wait, 30)
    return fates + Counter({f"exit {status}": 1, f"late {late.status}": 1})


async def _arrived(target: Target, count: int) -> None:
    """Wait until most requests are there; the first may have ended when the last come."""
    until = time.monotonic() + 10
    while sum((await asyncio.to_thread(target.left))[:2]) < 0.8 * count and time.monotonic() < until:
        await asyncio.sleep(0.05)


async def terminated(target: Target, count: int) -> Count:
    """SIGTERM under load: all that were taken have their whole answers."""
    return await _ended(target, count, 200)


async def cut_short(target: Target, count: int) -> Count:
    """The same, and the answers are longer than the server waits."""
    return await _ended(target, count, 1500)
