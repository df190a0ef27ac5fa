"""The HTTP server itself: uvicorn on a thread, so that the main one may load a model and hear signals."""

from __future__ import annotations

import socket
import threading
import time
from types import TracebackType
from typing import Self

import uvicorn
from starlette.types import ASGIApp

from ...errors import HerdError
from .connections import Connection

KEEP_ALIVE_SECONDS = 30
"""That a connection may be silent between two requests."""
CLOSING_SECONDS = 5
"""That replies get to their clients after the last of them was made."""
HEADER_BYTES = 64 << 10


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: name or address of an interface of this machine.
        port: 0 for any that is free.

    Raises:
        HerdError: the port is in use, or there is no such interface.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                                flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(2048)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise HerdError(f"cannot listen at port {port} of {host}: {reason}; choose another by --port or --host") \
            from error
    return sock


class HttpServer:
    """Runs an application until it is left; leaving it by an error drops what is still open.

    Args:
        app: answers.
        sock: listens; closed in the end.
    """

    def __init__(self, app: ASGIApp, sock: socket.socket) -> None:
        config = uvicorn.Config(
            app, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=CLOSING_SECONDS,
            h11_max_incomplete_event_size=HEADER_BYTES)
        self._server, self._socket = uvicorn.Server(config), sock
        self._thread = threading.Thread(target=self._server.run, args=([sock],), name="http", daemon=True)

    @property
    def url(self) -> str:
        """Where it answers."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started and self.alive:
            time.sleep(0.005)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._server.should_exit = True
        self._server.force_exit = kind is not None
        self._thread.join(CLOSING_SECONDS + 5)
        self._socket.close()
