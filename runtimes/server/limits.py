"""What a request may cost before anybody parses it: type, bytes, time and depth of its body."""

from __future__ import annotations

import asyncio
import re

import numpy as np
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_reply
from .options import ServerOptions

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_STEPS = np.zeros(256, np.int32)
_STEPS[[ord("["), ord("{")]], _STEPS[[ord("]"), ord("}")]] = 1, -1


class BodyLimits:
    """ASGI middleware that reads a body whole, within its limits, before the application runs.

    Args:
        app: gets the body in one piece, and then the rest of what the server says: that the client went.
        options: limits.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self.app, self.options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, or refuse the body."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except ApiError as error:
            error.headers["connection"] = "close"  # what is still on its way is not read
            await error_reply(scope["path"], error)(scope, receive, send)
            return
        if body is not None:
            await self.app(scope, _replay(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body, None when the client went meanwhile."""
        options = self.options
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > options.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(options.body_seconds):
                body = await self._collected(receive)
        except TimeoutError as error:
            message = f"the body did not come within {options.body_seconds:g} seconds"
            raise ApiError(408, message) from error
        if body:
            _require_json(headers)
            if depth_of(body) > options.json_depth:
                raise ApiError(400, f"the body is nested more than {options.json_depth} deep: make it flatter")
        return body

    async def _collected(self, receive: Receive) -> bytes | None:
        parts, size = [], 0
        while (message := await receive())["type"] == "http.request":
            size += len(message.get("body", b""))
            if size > self.options.body_bytes:
                raise self._too_large()
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.options.body_bytes} bytes: make it smaller")


def depth_of(body: bytes) -> int:
    """How deep lists and objects lie in each other; strings do not count."""
    if b"[" not in body and b"{" not in body:
        return 0
    outside = np.frombuffer(_STRING.sub(b"", body), np.uint8)
    return int(np.cumsum(_STEPS[outside]).max(initial=0))


def _require_json(headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"the body is {kind[:100] or 'of no type'}, send JSON with content-type: application/json")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A channel that says the body first."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed
