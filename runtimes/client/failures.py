"""What goes wrong with a server, in one line: it cannot be reached, it breaks off, or it refuses."""

from __future__ import annotations

import http.client
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ...errors import HerdError, StoppedError
from ...reading import parse_json
from .address import Address

ERROR_BYTES = 16 << 10
"""That are read of an error's body."""
_LONGEST = 300
_MARKUP = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.IGNORECASE | re.DOTALL)


class RefusedError(HerdError):
    """A reply that is not a success.

    Args:
        message: for people.
        status: of the reply.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def failures(address: Address, what: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Tell the errors of sockets, TLS and HTTP.

    Args:
        address: that is talked to.
        what: it does then, such as ``cannot be reached``.
        stopped: whether somebody broke the connection on purpose.

    Raises:
        StoppedError: somebody did.
        HerdError: in the place of any other of these errors.
    """
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        if stopped():
            raise StoppedError("the answer was stopped") from error
        raise HerdError(f"{address} {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (f"its certificate is not trusted here, {error.verify_message}; SSL_CERT_FILE names a file with further "
                "authorities")
    if isinstance(error, ssl.SSLError):
        return f"no TLS ({error.reason or error}): is it http:// there?"
    if isinstance(error, TimeoutError):
        return "nothing came for too long"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended in the middle"
    if isinstance(error, http.client.HTTPException):
        return f"that is no HTTP, {type(error).__name__} {error}"[:_LONGEST]
    return str(getattr(error, "strerror", None) or error)


def refusal(address: Address, status: int, body: bytes, moved: str | None) -> RefusedError:
    """The error of a reply that is not a success.

    Args:
        address: that was asked.
        status: of the reply.
        body: its beginning.
        moved: where it sends to; that is not followed, since the key would go along.
    """
    if moved and 300 <= status < 400:
        return RefusedError(f"{address} sends to {moved[:_LONGEST]}: give that URL if you trust it", status)
    advice = "; is the right API key given?" if status in (401, 403) else ""
    why = said(body) or "it does not say why"
    return RefusedError(f"{address} refuses with status {status}: {why}{advice}", status)


def said(body: bytes) -> str:
    """What an error's body says, of OpenAI's form or another, or a page for browsers: one line, cut if it is long."""
    try:
        text = message_of(parse_json(body, "an error"))
    except HerdError:
        text = _MARKUP.sub(" ", body.decode("utf-8", "replace"))
    words = " ".join(text.split())
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}…"


def message_of(value: Any) -> str:
    """The message inside of an error object, by any of the names that servers give it."""
    while isinstance(value, Mapping):
        value = next((value[name] for name in ("error", "message", "detail", "msg") if value.get(name)), "")
    return str(value)
