"""What strangers and their programs do to a server, one function each; what came back, counted by status."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any

from .abused_server import Target
from .addresses import ssrf
from .bombs import bombs, picture_chat
from .endings import cut_short, full_queue, terminated
from .forgeries import forgeries
from .malformed import Raw, malformed, request
from .strangers import PATIENCE, Body, Count, each, posted, sent
from .witnesses import WITNESSES

_REDUCED_BUFFER = 4096


# -- bodies ----------------------------------------------------------------------------------------------------------


async def malformed_bodies(target: Target, count: int) -> Count:
    """Valid requests, broken in all ways, on every address that takes a body."""
    async def send(raw: Raw) -> str:
        status, _ = await sent(target, raw.data)
        return f"{status}: {raw.kind}" if status.startswith("5") or status == "no reply" else status

    return await each(malformed(count), send, 64)


async def disconnects(target: Target, count: int) -> Count:
    """Clients that go before their body has ended, while they wait, or in the answer; politely or not."""
    random = Random(1)

    async def go(number: int) -> str:
        body: Body = {"messages": [{"role": "user", "content": f"{number} calves. " * random.choice([1, 30, 140])}],
                      "max_tokens": random.choice([50, 600]), "ignore_eos": True, "stream": number % 2 == 0}
        data = request("/v1/chat/completions", json.dumps(body).encode())
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        if number % 5 == 0:
            data = data[: random.randrange(len(data))]
        writer.write(data)
        waited = random.choice([0.0, 0.01, 0.05, 0.2, 1.0]) * random.random()
        try:
            async with asyncio.timeout(waited):
                await reader.read()
            moment = "after the answer"
        except TimeoutError:
            moment = "in the body" if number % 5 == 0 else "later"
        if number % 3 == 0:  # a reset in the place of an orderly end
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        return moment

    return await each(range(count), go, 32)


async def slow_readers(target: Target, count: int) -> Count:
    """Streams of which a byte is read a second, until the server has long had enough of it."""
    body = {"messages": [{"role": "user", "content": "Tell me everything."}], "max_tokens": 400, "ignore_eos": True,
            "stream": True, "logprobs": True, "top_logprobs": 20}
    data = request("/v1/chat/completions", json.dumps(body).encode())
    loop, files, until = asyncio.get_running_loop(), target.open_files(), time.monotonic() + 3 * PATIENCE

    async def read(_: int) -> str:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _REDUCED_BUFFER)
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", target.port))
            await loop.sock_sendall(sock, data)
            with suppress(ConnectionError):
                while time.monotonic() < until and await loop.sock_recv(sock, 1):
                    await asyncio.sleep(1)
            await asyncio.sleep(max(0.0, until + 3 - time.monotonic()))
            return "read"

    reading = asyncio.ensure_future(each(range(count), read, count))
    await asyncio.sleep(3 * PATIENCE + 1)
    held = target.open_files() - files - WITNESSES
    counted = await reading
    counted["connections that are held"] = max(0, held)
    return counted


# -- contents --------------------------------------------------------------------------------------------------------


async def image_bombs(target: Target, count: int) -> Count:
    """Pictures that are too large, too many, or none."""
    kinds = list(bombs().items())

    async def send(number: int) -> str:
        kind, urls = kinds[number % len(kinds)]
        status, _ = await posted(target, "/v1/chat/completions", picture_chat(urls))
        return f"{status}: {kind}" if status.startswith("5") or status in ("closed", "no reply") else status

    return await each(range(count), send, 4)


async def forged_tokens(target: Target, count: int) -> Count:
    """Control tokens in all texts of a chat: the model gets those of the template, and no more."""
    random = Random(2)
    special = _control_ids(target)

    async def send(_: int) -> str:
        honest, forged = forgeries(random, list(special.values()))
        replies = [await posted(target, "/v1/chat/completions/render", body) for body in (honest, forged)]
        if (status := replies[1][0]) != "200" or replies[0][0] != "200":
            return status if replies[0][0] == "200" else f"{replies[0][0]}: without forged tokens"
        controls = [[token for token in reply["prompt_token_ids"] if token in special] for _, reply in replies]
        return "200" if controls[0] == controls[1] else "200: forged"

    return await each(range(count), send, 8)


def _control_ids(target: Target) -> dict[int, str]:
    told = json.loads((target.bundle / "processor" / "tokenizer.json").read_text(encoding="utf-8"))
    return {token["id"]: token["content"] for token in told["added_tokens"] if token["special"]}


# -- all of them -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Abuse:
    """One way to abuse a server.

    Attributes:
        work: does it.
        count: how often.
        options: of the server.
        ends: whether the server has ended then, so that there is nothing to see afterwards.
    """

    work: Callable[[Target, int], Coroutine[Any, Any, Count]]
    count: int
    options: tuple[str, ...] = ()
    ends: bool = False


_ALLOWED = tuple(part for host in ("localhost", "ip6-localhost", "127.0.0.1", "::1", "0", "2130706433",
                                   socket.gethostname(), "localhost.localdomain") for part in ("--image-hosts", host))
ABUSES = {
    "malformed": Abuse(malformed_bodies, 2000),
    "disconnects": Abuse(disconnects, 500, ("--sequences", "16")),
    "slow readers": Abuse(slow_readers, 200),
    "image bombs": Abuse(image_bombs, 200),
    "ssrf": Abuse(ssrf, 530),
    "ssrf, allowed names": Abuse(ssrf, 530, _ALLOWED),
    "forged tokens": Abuse(forged_tokens, 500),
    "full queue": Abuse(full_queue, 400, ("--sequences", "1")),
    "sigterm": Abuse(terminated, 96, ends=True),
    "sigterm, cut short": Abuse(cut_short, 96, ("--drain-timeout", "1"), ends=True),
}
"""By name."""
