"""What strangers and their programs do to a server, one function each; what came back, counted by status."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

import httpx

from .bombs import bombs, picture_chat
from .forgeries import forgeries
from .malformed import malformed, request
from .witnesses import Body, Target, ask, client_of, questions, solo

T = TypeVar("T")
Count = Counter[str]
_PATIENCE = 40.0
_REDUCED_BUFFER = 4096


async def _each(things: Iterable[T], work: Callable[[T], Awaitable[str]], at_once: int) -> Count:
    """Do something to every thing, so many at the same time, and count what came of it."""
    free = asyncio.Semaphore(at_once)

    async def one(thing: T) -> str:
        async with free:
            return await work(thing)

    return Counter(await asyncio.gather(*(one(thing) for thing in things)))


async def _sent(target: Target, data: bytes) -> tuple[str, bytes]:
    """Send bytes, whatever they are; the status of the reply, or ``closed``, and the reply."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    try:
        async with asyncio.timeout(_PATIENCE):
            writer.write(data)
            reply = await reader.read()
    except ConnectionError:
        reply = b""
    except TimeoutError:
        return "no reply", b""
    finally:
        writer.transport.abort()
    return reply[9:12].decode() if reply.startswith(b"HTTP/1.1 ") else "closed", reply


async def _posted(target: Target, path: str, body: Body) -> tuple[str, Any]:
    """The status of a reply, and what it says."""
    status, reply = await _sent(target, request(path, json.dumps(body).encode()))
    return status, json.loads(reply.partition(b"\r\n\r\n")[2] or b"null")


# -- bodies ----------------------------------------------------------------------------------------------------------


async def malformed_bodies(target: Target, count: int) -> Count:
    """Valid requests, broken in all ways, on every address that takes a body."""
    async def send(raw: Any) -> str:
        status, _ = await _sent(target, raw.data)
        return f"{status}: {raw.kind}" if status.startswith("5") or status == "no reply" else status

    return await _each(malformed(count), send, 64)


async def disconnects(target: Target, count: int) -> Count:
    """Clients that go before their body has ended, while they wait, or in the answer; politely or not."""
    random = Random(1)

    async def go(number: int) -> str:
        body: Body = {"messages": [{"role": "user", "content": f"{number} calves. " * random.choice([1, 30, 140])}],
                      "max_tokens": random.choice([50, 600]), "ignore_eos": True, "stream": number % 2 == 0}
        data = request("/v1/chat/completions", json.dumps(body).encode())
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        if number % 5 == 0:
            data = data[: random.randrange(len(data))]
        writer.write(data)
        waited = random.choice([0.0, 0.01, 0.05, 0.2, 1.0]) * random.random()
        try:
            async with asyncio.timeout(waited):
                await reader.read()
            moment = "after the answer"
        except TimeoutError:
            moment = "in the body" if number % 5 == 0 else "later"
        if number % 3 == 0:  # a reset in the place of an orderly end
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        return moment

    return await _each(range(count), go, 32)


async def slow_readers(target: Target, count: int) -> Count:
    """Streams of which a byte is read a second, until the server has enough of it."""
    body = {"messages": [{"role": "user", "content": "Tell me everything."}], "max_tokens": 400, "ignore_eos": True,
            "stream": True, "logprobs": True, "top_logprobs": 20}
    data = request("/v1/chat/completions", json.dumps(body).encode())
    loop = asyncio.get_running_loop()

    async def read(_: int) -> str:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _REDUCED_BUFFER)
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", target.port))
            await loop.sock_sendall(sock, data)
            until = time.monotonic() + 3 * _PATIENCE
            try:
                while time.monotonic() < until:
                    if not await loop.sock_recv(sock, 1):
                        return "whole"
                    await asyncio.sleep(1)
            except ConnectionError:
                return "cut off"
            return "still open"

    return await _each(range(count), read, count)


# -- contents --------------------------------------------------------------------------------------------------------


async def image_bombs(target: Target, count: int) -> Count:
    """Pictures that are too large, too many, or none."""
    kinds = list(bombs().items())

    async def send(number: int) -> str:
        kind, urls = kinds[number % len(kinds)]
        status, _ = await _posted(target, "/v1/chat/completions", picture_chat(urls))
        return f"{status}: {kind}" if status.startswith("5") or status in ("closed", "no reply") else status

    return await _each(range(count), send, 4)


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
            body = {"model": target.bundle.name, "max_tokens": 2,
                    "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}
            return (await _posted(target, "/v1/messages", body))[0]
        return (await _posted(target, "/v1/chat/completions", picture_chat([url])))[0]

    counted = await _each(range(count), send, 8)
    for server in servers:
        server.close()
    counted["connections"] = len(came)
    return counted


async def _listener(came: list[str], port: int) -> asyncio.Server:
    def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(str(writer.get_extra_info("sockname")))
        writer.close()

    return await asyncio.start_server(note, ["127.0.0.1", "::1"] if socket.has_ipv6 and port else "127.0.0.1", port)


async def forged_tokens(target: Target, count: int) -> Count:
    """Control tokens in all texts of a chat: the model gets those of the template, and no more."""
    random = Random(2)
    special = _control_ids(target)

    async def send(_: int) -> str:
        honest, forged = forgeries(random, list(special.values()))
        replies = [await _posted(target, "/v1/chat/completions/render", body) for body in (honest, forged)]
        if (status := replies[1][0]) != "200" or replies[0][0] != "200":
            return status if replies[0][0] == "200" else f"{replies[0][0]}: without forged tokens"
        controls = [[token for token in reply["prompt_token_ids"] if token in special] for _, reply in replies]
        return "200" if controls[0] == controls[1] else "200: forged"

    return await _each(range(count), send, 8)


def _control_ids(target: Target) -> dict[int, str]:
    told = json.loads((target.bundle / "processor" / "tokenizer.json").read_text(encoding="utf-8"))
    return {token["id"]: token["content"] for token in told["added_tokens"] if token["special"]}


# -- too many, and the end -------------------------------------------------------------------------------------------


async def full_queue(target: Target, count: int) -> Count:
    """More requests than run and wait: some are refused and told when to come again, all others are answered."""
    asked = questions(16, 24)
    alone = await solo(target.url, asked)
    async with client_of(target.url) as client:
        heard = await asyncio.gather(*(ask(client, asked[number % 16]) for number in range(count)))
    return Counter(_fate(one, alone[number % 16]) for number, one in enumerate(heard))


def _fate(heard: Any, right: str) -> str:
    if heard.whole:
        return "200" if heard.text == right else "200: wrong answer"
    if heard.status == httpx.codes.SERVICE_UNAVAILABLE:
        return "503" if heard.retry_after or not heard.events else "503 without Retry-After"
    if heard.status == httpx.codes.OK and "cancelled" in heard.failure:
        return "error event"
    return f"lost: {heard.status} {heard.failure[:100]}"


async def _ended(target: Target, count: int, tokens: int) -> Count:
    asked = questions(16, tokens)
    alone = await solo(target.url, asked)
    async with client_of(target.url) as client:
        running = [asyncio.ensure_future(ask(client, asked[number % 16])) for number in range(count)]
        await asyncio.sleep(0.5)
        target.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        late = await ask(client, asked[0])
        heard = await asyncio.gather(*running)
    fates = Counter(_fate(one, alone[number % 16]) for number, one in enumerate(heard))
    status = await asyncio.to_thread(target.process.wait, 30)
    return fates + Counter({f"exit {status}": 1, f"late {late.status}": 1})


async def terminated(target: Target, count: int) -> Count:
    """SIGTERM under load: all that were taken have their whole answers."""
    return await _ended(target, count, 200)


async def cut_short(target: Target, count: int) -> Count:
    """The same, and the answers are longer than the server waits."""
    return await _ended(target, count, 1500)


@dataclass(frozen=True)
class Abuse:
    """One way to abuse a server.

    Attributes:
        work: does it.
        count: how often.
        options: of the server.
        ends: whether the server has ended then, so that there is nothing to see afterwards.
    """

    work: Callable[[Target, int], Awaitable[Count]]
    count: int
    options: tuple[str, ...] = ()
    ends: bool = False


_ALLOWED = tuple(part for host in ("localhost", "ip6-localhost", "127.0.0.1", "::1", "0", "2130706433",
                                   socket.gethostname(), "localhost.localdomain") for part in ("--image-hosts", host))
ABUSES = {
    "malformed": Abuse(malformed_bodies, 2000),
    "disconnects": Abuse(disconnects, 500, ("--sequences", "16")),
    "slow readers": Abuse(slow_readers, 200),
    "image bombs": Abuse(image_bombs, 200),
    "ssrf": Abuse(ssrf, 530),
    "ssrf, allowed names": Abuse(ssrf, 530, _ALLOWED),
    "forged tokens": Abuse(forged_tokens, 500),
    "full queue": Abuse(full_queue, 400, ("--sequences", "1")),
    "sigterm": Abuse(terminated, 96, ends=True),
    "sigterm, cut short": Abuse(cut_short, 96, ("--drain-timeout", "1"), ends=True),
}
"""By name."""
