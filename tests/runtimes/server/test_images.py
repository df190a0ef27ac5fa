"""Pictures from elsewhere: which hosts and addresses are asked, and what is taken from them."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import pytest

from herdgraph.runtimes.server import images
from herdgraph.runtimes.server.errors import ApiError

HOSTS = ("images.example.com", "*.example.org")


@pytest.mark.parametrize(("address", "public"), [
    ("93.184.216.34", True), ("2606:2800:220:1:248:1893:25c8:1946", True), ("127.0.0.1", False), ("10.0.0.1", False),
    ("169.254.169.254", False), ("192.168.1.1", False), ("172.16.0.1", False), ("100.64.0.1", False),
    ("0.0.0.0", False), ("224.0.0.1", False), ("255.255.255.255", False), ("198.18.0.1", False), ("::1", False),
    ("::", False), ("fe80::1", False), ("fc00::1", False), ("ff0e::1", False), ("::ffff:127.0.0.1", False),
    ("::ffff:93.184.216.34", True), ("64:ff9b::a00:1", False), ("64:ff9b::5db8:d822", True), ("2002:7f00:1::", False),
    ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False), ("64:ff9b:1::a00:1", False),
])
def test_public_addresses(address: str, public: bool) -> None:
    assert images.is_public(ipaddress.ip_address(address)) is public


def fetch(url: str) -> bytes:
    return asyncio.run(images.fetch(url, HOSTS))


@pytest.mark.parametrize(("url", "problem"), [
    ("file:///etc/passwd", "neither data"), ("ftp://images.example.com/x", "neither data"), ("/etc/passwd", "neither"),
    ("https://evil.com/x", "fetches nothing"), ("https://images.example.com.evil.com/x", "fetches nothing"),
    ("https://example.org/x", "fetches nothing"), ("https://evilexample.org/x", "fetches nothing"),
    ("http://images.example.com:8080/x", "a port"), ("http://images.example.com:22/x", "a port"),
    ("https://me:you@images.example.com/x", "user name"), ("https://images.example.com@evil.com/x", "fetches nothing"),
    ("http://images.example.com:99999/", "no URL"), ("http://[::1/", "no URL"),
    ("https://images.example.com/a b", "escaped"), ("https://images.example.com/\r\nHost: x", "escaped"),
])
def test_urls_that_are_refused(url: str, problem: str) -> None:
    with pytest.raises(ApiError, match=problem):
        fetch(url)


def test_a_name_that_leads_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """One address of several that is not public is enough."""
    _resolve(monkeypatch, "93.184.216.34", "127.0.0.1")
    with pytest.raises(ApiError, match="not public"):
        fetch("http://images.example.com/x")


def _resolve(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Let every name have some addresses; returns the names that were asked for."""
    asked: list[str] = []

    def resolve(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


class _Handler(BaseHTTPRequestHandler):
    seen: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Host"]))
        status = 302 if self.path == "/moved" else 200
        self.send_response(status)
        self.send_header("Location", "http://127.0.0.1/secret")
        self.end_headers()
        self.wfile.write(b"x" * 5000 if self.path == "/large" else b"picture")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def dialed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A host on the internet, which is this machine; the addresses that were dialed."""
    server = HTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    dial, addresses = socket.create_connection, list[Any]()

    def redirected(address: Any, **options: Any) -> socket.socket:
        addresses.append(address)
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        return dial(server.server_address, **options)

    resolve = socket.getaddrinfo
    monkeypatch.setattr(images.socket, "create_connection", redirected)
    yield addresses
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_address_that_was_checked_is_dialed(dialed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _resolve(monkeypatch, "93.184.216.34")
    assert fetch("http://images.example.com/a?b=c") == b"picture"
    assert dialed == [("93.184.216.34", 80)]
    assert asked == ["images.example.com"]
    assert _Handler.seen[-1] == ("/a?b=c", "images.example.com")


def test_nothing_is_followed(dialed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _resolve(monkeypatch, "93.184.216.34")
    with pytest.raises(ApiError, match="status 302"):
        fetch("http://images.example.com/moved")
    assert len(dialed) == 1


def test_size(dialed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _resolve(monkeypatch, "93.184.216.34")
    monkeypatch.setattr(images, "MOST_BYTES", 1000)
    with pytest.raises(ApiError, match="more than 1000 bytes"):
        fetch("http://images.example.com/large")
