"""Pictures at addresses of the network that a server is in: none of them may be asked."""

from __future__ import annotations

import asyncio
import socket

from .abused_server import Target
from .bombs import picture_chat
from .strangers import Body, Count, each, posted

_HOSTS = (
    "127.0.0.1", "localhost", "LOCALHOST.", "localhost.localdomain", "127.1", "127.0.1", "0.0.0.0", "0", "2130706433",
    "0x7f000001", "0x7f.1", "017700000001", "0177.0.0.1", "127.0.0.1.", "[::1]", "[::]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1%25lo]", "[fc00::1]", "169.254.169.254",
    "metadata.google.internal", "10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "224.0.0.1", "255.255.255.255",
    "user@127.0.0.1", "example.com@127.0.0.1", "127.0.0.1#example.com", "127.0.0.1\\@example.com", "ⓛocalhost",
    "１２７.0.0.1", "127。0。0。1", "ip6-localhost", "ip6-loopback", "127.0.0.1.nip.io", "localtest.me",
    socket.gethostname(),
)
_FORMS = ("http://{}/a.png", "https://{}/a.png", "http://{}:{port}/a.png", "HTTP://{}/", "//{}/a.png",
          "http://{}/\r\nHost: x")
_OTHERS = ("file:///etc/passwd", "ftp://127.0.0.1/", "gopher://127.0.0.1:6379/_x", "/etc/passwd", "", "data:,x",
           "blob:x", "javascript:1", "jar:http://127.0.0.1!/", "http://", "http:///x", "http://[", "http://a:b:c/")


async def ssrf(target: Target, count: int) -> Count:
    """Pictures at addresses inside the network; listeners on loopback count who comes."""
    came: list[str] = []
    servers = [await _listener(came, port) for port in (0, 80, 443)]
    port = servers[0].sockets[0].getsockname()[1]
    urls = [form.format(host, port=port) for host in _HOSTS for form in _FORMS] + list(_OTHERS)

    async def send(number: int) -> str:
        url = urls[number % len(urls)]
        if number % 2:
            source = {"type": "url", "url": url}
            body: Body = {"model": target.bundle.name, "max_tokens": 2,
                    "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}
            return (await posted(target, "/v1/messages", body))[0]
        return (await posted(target, "/v1/chat/completions", picture_chat([url])))[0]

    counted = await each(range(count), send, 8)
    for server in servers:
        server.close()
    counted["connections"] = len(came)
    return counted


async def _listener(came: list[str], port: int) -> asyncio.Server:
    def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(str(writer.get_extra_info("sockname")))
        writer.close()

    return await asyncio.start_server(note, ["127.0.0.1", "::1"] if socket.has_ipv6 and port else "127.0.0.1", port)
