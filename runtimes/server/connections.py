"""Connections as uvicorn has them, with two differences.

Those on which nothing moves are ended: uvicorn waits forever for the head of a first request, and for somebody to take
the last bytes before it closes. And what is no HTTP is refused with an error object, as everything is.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import wrong
from .replies import json_bytes

LOOK_SECONDS = 10.0
LOOKS = 3
"""So often a connection is found as it was before it is ended."""


class Connection(H11Protocol):
    """A connection that is looked at from time to time.

    Between requests, which is before the first one too, and while it closes, a new request or bytes that the client
    takes are what keeps it. In a request the application has its own limits of time.
    """

    _found: tuple[object, int] = (None, 0)
    _times = 0
    _looking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to look."""
        super().connection_made(transport)
        self._looking = self.loop.call_later(LOOK_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """End to look."""
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        body = json_bytes(wrong(msg).body())
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        head = h11.Response(status_code=400, headers=headers, reason="Bad Request")
        self.transport.writelines(self.conn.send(event) or b"" for event in (head, h11.Data(body), h11.EndOfMessage()))
        self.transport.close()

    def _look(self) -> None:
        found = self.cycle, self.transport.get_write_buffer_size()
        waits = self.transport.is_closing() or self.conn.their_state is h11.IDLE
        self._times = self._times + 1 if waits and found == self._found else 0
        self._found = found
        if self._times >= LOOKS:
            self.transport.abort()
        else:
            self._looking = self.loop.call_later(LOOK_SECONDS, self._look)
