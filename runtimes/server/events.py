"""Server-sent events: a stream that says that it lives, tells its errors, and cuts off who does not read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...errors import HerdError
from .errors import ApiError, of_herd_error
from .options import ServerOptions
from .replies import json_bytes

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def event(value: Any, name: str | None = None) -> bytes:
    """One event, with a name where its API has names."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + json_bytes(value) + b"\n\n"


def openai_failure(error: ApiError) -> bytes:
    """How a stream of OpenAI's older APIs ends that failed."""
    return event(error.body()) + DONE


class EventStream(Response):
    """A stream of events.

    Args:
        events: the events' bytes.
        running: what generates them; closed when the stream ends, however it does, even before it begins.
        options: times.
        failure: what is said in the place of the rest when ``events`` fails.
        headers: further ones.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], running: ExitStack, options: ServerOptions,
        failure: Callable[[ApiError], bytes], headers: Mapping[str, str] | None = None,
    ) -> None:
        self._events, self._running, self._options, self._failure = events, running, options, failure
        self.status_code, self.background = 200, None
        self.init_headers({**_HEADERS, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""
        try:
            with self._running:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for part in self._living():
                    await self._send(send, part, more=True)
            await self._send(send, b"", more=False)
        except TimeoutError:
            log.warning("%s: the client did not read for %g s, it is cut off", scope["path"],
                        self._options.write_seconds)
        finally:
            await self._events.aclose()

    async def _send(self, send: Send, body: bytes, *, more: bool) -> None:
        async with asyncio.timeout(self._options.write_seconds):
            await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _living(self) -> AsyncIterator[bytes]:
        """The events, with comments between those that come late."""
        coming = asyncio.ensure_future(self._next())
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=self._options.keep_alive_seconds)
                if not done:
                    yield KEEP_ALIVE
                    continue
                part, last = coming.result()
                if part:
                    yield part
                if last:
                    return
                coming = asyncio.ensure_future(self._next())
        finally:
            coming.cancel()
            with suppress(asyncio.CancelledError):
                await coming

    async def _next(self) -> tuple[bytes, bool]:
        """The next event, and whether it is the last."""
        try:
            return await anext(self._events), False
        except StopAsyncIteration:
            return b"", True
        except ApiError as error:
            return self._failure(error), True
        except HerdError as error:
            return self._failure(of_herd_error(error)), True
        except Exception:
            log.exception("a stream failed")
            return self._failure(ApiError(500, "the server failed: see its log")), True
