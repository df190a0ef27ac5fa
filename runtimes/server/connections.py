"""Connections as uvicorn has them, with three differences.

Those on which nothing moves are ended: uvicorn waits forever for the head of a first request, and for somebody to take
the last bytes before it closes. What is no HTTP is refused with an error object, as everything is. And who sends such
things again and again does not fill the log.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import wrong
from .replies import json_bytes

LOOK_SECONDS = 10.0
LOOKS = 3
"""So often a connection is found as it was before it is ended."""


QUIET_SECONDS = 60.0
"""After a warning, until the next one."""


class RareWarnings(logging.Filter):
    """Lets a warning pass once in a while, which then says how many did not; what is worse always passes."""

    _last = -math.inf
    _left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record passes."""
        if record.levelno != logging.WARNING:
            return True
        if (now := time.monotonic()) < self._last + QUIET_SECONDS:
            self._left_out += 1
            return False
        if self._left_out:
            record.msg = f"{record.msg} (and {self._left_out} times more since the last such line)"
        self._last, self._left_out = now, 0
        return True


log = logging.getLogger(__name__)
log.addFilter(RareWarnings())


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
        self.logger = log
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
