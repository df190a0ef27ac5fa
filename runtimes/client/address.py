"""Where a server is, from the URL that a person gave."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from ...errors import HerdError, shown

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Address:
    """A server's API.

    Attributes:
        url: as it is shown, without a slash at its end.
        secure: whether it is reached by TLS.
        host: name or address.
        port: of TCP.
        path: that the paths of the API come after, such as ``/v1``.
    """

    url: str
    secure: bool
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> Address:
        """The address that a URL names; one without a path is completed by ``/v1``.

        Raises:
            HerdError: it is no such URL, or has parts that would be lost.
        """
        if not url.isascii() or not url.isprintable() or " " in url:
            raise HerdError(f"the URL {shown(url)} has blanks or other characters that have to be escaped")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise HerdError(f"the URL {shown(url)} cannot be read: {error}") from error
        if parts.scheme not in _PORTS or not host:
            raise HerdError(f"the URL {shown(url)} is not of the form http://HOST:PORT or https://HOST/PATH")
        if parts.username is not None or parts.query or parts.fragment:
            raise HerdError("the URL has a user name, a query or a fragment: leave them out; a key is given apart")
        path = parts.path.rstrip("/") or "/v1"
        return cls(f"{parts.scheme}://{parts.netloc}{path}", parts.scheme == "https", host,
                   _PORTS[parts.scheme] if port is None else port, path)

    def __str__(self) -> str:
        return self.url
