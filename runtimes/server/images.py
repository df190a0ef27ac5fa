"""Pictures and videos from elsewhere, only of hosts that the operator named, and only of addresses that are public.

A server that fetches what strangers name can be sent to the network behind it. So a name is resolved once, every
address of the answer has to be public, one of those is dialed, and nothing is followed from there.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable
from contextlib import closing
from urllib.parse import SplitResult, urlsplit

from anyio import to_thread

from .errors import wrong

MOST_BYTES = 32 << 20
SECONDS = 10.0
_PORTS = {"http": 80, "https": 443}
_PART = 1 << 16
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


async def fetch(url: str, hosts: Iterable[str], field: str = "image_url") -> bytes:
    """The bytes behind an ``http:`` or ``https:`` URL.

    Args:
        url: as the request has it.
        hosts: that are allowed: a name, or ``*.name`` for those below it.
        field: in which the URL stood, for messages.

    Raises:
        ApiError: another host, an address that is not public, or no answer within limits.
    """
    parts = _checked(url, tuple(hosts), field)
    host, port = parts.hostname or "", _PORTS[parts.scheme]
    address = await _public_address(host, port, field)
    try:
        async with asyncio.timeout(SECONDS + 1):
            return await to_thread.run_sync(_download, parts, str(address), abandon_on_cancel=True)
    except (OSError, http.client.HTTPException, TimeoutError) as error:
        raise wrong(f"the {field} of {host} cannot be fetched: {error or type(error).__name__}", "messages") from error


def _checked(url: str, hosts: tuple[str, ...], field: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:
        raise wrong(f"the {field} is no URL: {error}", "messages") from error
    if parts.scheme not in _PORTS:
        raise wrong(f"the {field} is neither data:...;base64, nor https:", "messages")
    if not any(host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in map(str.lower, hosts)):
        raise wrong(f"the {field} is of a host from which this server fetches nothing (--image-hosts): give it as "
                    "data:...;base64,", "messages")
    if port not in (None, _PORTS[parts.scheme]) or parts.username is not None:
        raise wrong(f"the {field} has a port or a user name: leave them out", "messages")
    if any(ord(letter) <= 32 or ord(letter) > 126 for letter in url):
        raise wrong(f"the {field} has characters that have to be escaped", "messages")
    return parts


async def _public_address(host: str, port: int, field: str) -> Address:
    """One address of a host, all of which are public."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(SECONDS):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError) as error:
        raise wrong(f"the host {host} of the {field} is not found", "messages") from error
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise wrong(f"the host {host} of the {field} has an address that is not public", "messages")
    return addresses[0]


def is_public(address: Address) -> bool:
    """Whether an address belongs to the internet; of those that hold another one, both do."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if any(address in network for network in _NAT64):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.teredo or address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _download(parts: SplitResult, address: str) -> bytes:
    """Ask one address for what the URL names. Runs on a thread; every wait ends."""
    ends = time.monotonic() + SECONDS
    host = parts.hostname or ""
    with closing(_dial(parts, address)) as sock:
        connection = http.client.HTTPConnection(host, timeout=SECONDS)
        connection.sock = sock
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": host, "Accept": "image/*, video/*", "User-Agent": "herdgraph"}
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
        if response.status != 200:
            raise http.client.HTTPException(f"it answers with status {response.status}")
        return _read(response, sock, ends)


def _dial(parts: SplitResult, address: str) -> socket.socket:
    plain = socket.create_connection((address, _PORTS[parts.scheme]), timeout=SECONDS)
    if parts.scheme == "http":
        return plain
    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname)
    except BaseException:
        plain.close()
        raise


def _read(response: http.client.HTTPResponse, sock: socket.socket, ends: float) -> bytes:
    data = bytearray()
    while part := response.read1(_PART):
        data += part
        if len(data) > MOST_BYTES:
            raise http.client.HTTPException(f"it has more than {MOST_BYTES} bytes")
        if (left := ends - time.monotonic()) <= 0:
            raise TimeoutError(f"it does not come within {SECONDS:g} seconds")
        sock.settimeout(left)
    return bytes(data)
