"""Connections on which nothing moves end, others do not."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from starlette.types import Receive, Scope, Send

from herdgraph.runtimes.server import connections
from herdgraph.runtimes.server.connections import RareWarnings
from herdgraph.runtimes.server.listen import HttpServer, listening

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
LARGE = 16 << 20
"""More than the system takes for somebody who does not read."""


async def large(scope: Scope, receive: Receive, send: Send) -> None:
    size = LARGE if scope["path"] == "/large" else 2
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
    await send({"type": "http.response.body", "body": b"x" * size})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    monkeypatch.setattr(connections, "LOOK_SECONDS", 0.05)
    with HttpServer(large, listening("127.0.0.1", 0)) as server:
        yield server


def connected(server: HttpServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5)


@pytest.mark.parametrize("begun", [b"", GET[:-2], GET + GET[:9]], ids=["nothing", "half a head", "half a second one"])
def test_a_head_that_does_not_come(server: HttpServer, begun: bytes) -> None:
    with connected(server) as sock:
        sock.sendall(begun)
        while sock.recv(1000):
            pass


def test_a_head_that_trickles(server: HttpServer) -> None:
    with connected(server) as sock, suppress(ConnectionError):
        for byte in GET[:-1]:
            time.sleep(0.05)
            sock.sendall(bytes([byte]))
        pytest.fail("it was waited for")


def test_a_reply_that_is_not_read(server: HttpServer) -> None:
    received = 0
    with connected(server) as sock, suppress(ConnectionResetError):
        sock.sendall(GET.replace(b"/ ", b"/large "))
        time.sleep(0.5)
        while part := sock.recv(1 << 20):
            received += len(part)
    assert received < LARGE


def test_requests_keep_a_connection(server: HttpServer) -> None:
    with connected(server) as sock:
        for _ in range(8):
            sock.sendall(GET)
            reply = b""
            while not reply.endswith(b"\r\n\r\nxx"):
                reply += sock.recv(1000)
            time.sleep(0.06)


def test_what_is_no_http(server: HttpServer) -> None:
    with connected(server) as sock:
        sock.sendall(b"HELO x\r\n\r\n")
        reply = b"".join(iter(lambda: sock.recv(1000), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_the_log_of_what_is_no_http_stays_short(server: HttpServer, caplog: pytest.LogCaptureFixture) -> None:
    warnings = RareWarnings()
    connections.log.filters[:] = [warnings]
    for number in range(5):
        if number == 4:
            warnings._last = -math.inf  # a minute later
        with connected(server) as sock:
            sock.sendall(b"HELO x\r\n\r\n")
            while sock.recv(1000):
                pass
    assert [record.getMessage() for record in caplog.records] == [
        "Invalid HTTP request received.",
        "Invalid HTTP request received. (and 3 times more since the last such line)"]
    connections.log.warning("of another kind")
    connections.log.error("a defect")
    assert [record.getMessage() for record in caplog.records[2:]] == ["a defect"]
