"""HTTP to one server: a reply that is JSON, or one that is a stream of events which may be stopped at any time."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ...errors import HerdError
from ...reading import parse_json
from .address import Address
from .events import events
from .failures import ERROR_BYTES, failures, refusal

REACH_SECONDS = 15.0
"""That a server has to accept a connection, and to say which models it has."""
SILENCE_SECONDS = 600.0
"""That a server may be silent while it answers: not all of them say that they are still at a long prompt."""
REPLY_BYTES = 8 << 20
"""Most of a reply that is one JSON document."""
_LOOKS = 0.05  # seconds between two looks at whether the answer is wanted


class Connection:
    """Asks a server, each time on a connection of its own. Redirects are not followed, proxies are not used.

    Args:
        address: of the server.
        key: that is sent along, None for none.
    """

    def __init__(self, address: Address, key: str | None = None) -> None:
        self.address = address
        self._headers = {"User-Agent": "herdgraph", **({"Authorization": f"Bearer {key}"} if key else {})}

    def get(self, path: str) -> Any:
        """The JSON document at a path.

        Raises:
            HerdError: the server cannot be reached, refuses, or sends something else.
        """
        with failures(self.address, "does not answer"), ExitStack() as held:
            response = self._asked(held, self._reached(held, REACH_SECONDS), "GET", path)
            content = response.read(REPLY_BYTES + 1)
        if len(content) > REPLY_BYTES:
            raise HerdError(f"{self.address} answers with more than {REPLY_BYTES} bytes")
        return parse_json(content, f"the answer of {self.address}{path}", "is it a server of OpenAI's form?")

    def stream(self, path: str, body: Mapping[str, Any], stopped: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """The events that answer a request; the connection is closed when they are not read to the end.

        Args:
            path: that is asked.
            body: of the request.
            stopped: asked again and again; where it is true the connection is closed, which ends the answer.

        Raises:
            StoppedError: it was stopped.
            HerdError: the server cannot be reached, refuses, fails, or sends something else.
        """
        with failures(self.address, "breaks off", stopped), ExitStack() as held:
            connection = self._reached(held, SILENCE_SECONDS)
            held.enter_context(_hang_up_when(stopped, connection.sock))
            response = self._asked(held, connection, "POST", path, json.dumps(body).encode())
            kind = response.headers.get_content_type()
            if kind != "text/event-stream":
                raise HerdError(f"{self.address} answers with {kind[:60]}, text/event-stream is needed: is it a server "
                                "of OpenAI's form?")
            yield from events(response, str(self.address))

    def _reached(self, held: ExitStack, silence: float) -> http.client.HTTPConnection:
        """A connection to the server, whose reads wait for so many seconds."""
        to = self.address
        if to.secure:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                to.host, to.port, timeout=REACH_SECONDS, context=ssl.create_default_context())
        else:
            connection = http.client.HTTPConnection(to.host, to.port, timeout=REACH_SECONDS)
        held.callback(connection.close)
        with failures(to, "cannot be reached"):
            connection.connect()
        connection.sock.settimeout(silence)
        return connection

    def _asked(
        self, held: ExitStack, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
    ) -> http.client.HTTPResponse:
        """The reply to a request, if it is a success."""
        headers = self._headers if body is None else {**self._headers, "Content-Type": "application/json"}
        with suppress(BrokenPipeError, ConnectionResetError):  # who refuses a long body stops reading, and says why
            connection.request(method, f"{self.address.path}{path}", body, headers)
        response = held.enter_context(connection.getresponse())
        if response.status != http.HTTPStatus.OK:
            raise refusal(self.address, response.status, response.read(ERROR_BYTES), response.headers.get("Location"))
        return response


@contextmanager
def _hang_up_when(stopped: Callable[[], bool], sock: socket.socket) -> Iterator[None]:
    """Break a connection from a thread beside, since whoever waits for the next byte looks at nothing else."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_LOOKS):
            if stopped():
                with suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)  # the plain one: TLS would say farewell first
                return

    watcher = threading.Thread(target=watch, name="stops an answer", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
