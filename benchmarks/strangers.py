"""Many strangers at a server at the same time: what came back to them, counted."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from .abused_server import Target
from .malformed import request

T = TypeVar("T")
Body = dict[str, Any]
Count = Counter[str]
PATIENCE = 40.0
"""Seconds that a stranger waits for a reply."""


async def each(things: Iterable[T], work: Callable[[T], Awaitable[str]], at_once: int) -> Count:
    """Do something to every thing, so many at the same time, and count what came of it."""
    free = asyncio.Semaphore(at_once)

    async def one(thing: T) -> str:
        async with free:
            return await work(thing)

    return Counter(await asyncio.gather(*(one(thing) for thing in things)))


async def sent(target: Target, data: bytes) -> tuple[str, bytes]:
    """Send bytes, whatever they are; the status of the reply, or ``closed``, and the reply."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    try:
        async with asyncio.timeout(PATIENCE):
            writer.write(data)
            reply = await reader.read()
    except ConnectionError:
        reply = b""
    except TimeoutError:
        return "no reply", b""
    finally:
        writer.transport.abort()
    reply = reply.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    return reply[9:12].decode() if reply.startswith(b"HTTP/1.1 ") else "closed", reply


async def posted(target: Target, path: str, body: Body) -> tuple[str, Any]:
    """The status of a reply, and what it says."""
    status, reply = await sent(target, request(path, json.dumps(body).encode()))
    return status, json.loads(reply.partition(b"\r\n\r\n")[2] or b"null")
