"""A client that goes takes its request with it, streamed or not, queued or running.

Starlette cancels only streams, and those only when something is sent. Here a second task listens to the connection as
long as a route works, and cancels it: the cancellation reaches the loop over an answer, which ends the answer.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CancelOnDisconnect:
    """ASGI middleware; below one that reads the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application until it ends or its client goes."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = await receive()
        work = asyncio.ensure_future(self.app(scope, _once(body), send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
                with suppress(asyncio.CancelledError):
                    await work
        if not work.cancelled():
            work.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _once(body: Message) -> Receive:
    """A channel that says one message, and nothing more: the other task listens."""
    said = False

    async def channel() -> Message:
        nonlocal said
        if said:
            await asyncio.Event().wait()
        said = True
        return body

    return channel
