"""What a request may cost before anybody parses it: type, bytes, time, depth and values of its body.

A model with a long context takes larger bodies: each of its tokens may be an id of its own in a prompt.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import numpy as np
from anyio import to_thread
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_reply
from .parsing import LARGE
from .serving import Serving

_STEPS = np.zeros(256, np.int8)
_STEPS[[ord("["), ord("{")]], _STEPS[[ord("]"), ord("}")]] = 1, -1
_PART = 1 << 20  # bytes that are looked at at once
_BYTES_OF_A_TOKEN = 8  # of an id with comma and space, and about of the text of one


class BodyLimits:
    """ASGI middleware that reads a body whole, within its limits, before the application runs.

    Args:
        app: gets the body in one piece, and then the rest of what the server says: that the client went.
        serving: knows the limits and the context.
    """

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self.app, self.serving, self.options = app, serving, serving.options

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
        if declared.isdecimal() and int(declared[:20]) > self._most_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(options.body_seconds):
                body = await self._collected(receive)
        except TimeoutError as error:
            message = f"the body did not come within {options.body_seconds:g} seconds"
            raise ApiError(408, message) from error
        if body:
            _require_json(headers, body)
            await self._measure(body)
        return body

    async def _measure(self, body: bytes) -> None:
        """Refuse what takes long to parse."""
        most = self.options
        extent = await to_thread.run_sync(extent_of, body) if len(body) > LARGE else extent_of(body)
        if extent.depth > most.json_depth:
            raise ApiError(400, f"the body is nested more than {most.json_depth} deep: make it flatter")
        if extent.lists > most.json_lists:
            raise ApiError(413, f"the body has more than {most.json_lists} lists and objects: send fewer")
        if extent.values > (values := most.json_values + self.serving.most_context):
            raise ApiError(413, f"the body has more than {values} values: send fewer")

    async def _collected(self, receive: Receive) -> bytes | None:
        parts, size = [], 0
        while (message := await receive())["type"] == "http.request":
            size += len(message.get("body", b""))
            if size > self._most_bytes:
                raise self._too_large()
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)
        return None

    @property
    def _most_bytes(self) -> int:
        return self.options.body_bytes + _BYTES_OF_A_TOKEN * self.serving.most_context

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._most_bytes} bytes: make it smaller")


class Extent(NamedTuple):
    """How much a JSON text holds.

    Attributes:
        depth: of lists and objects in each other.
        lists: and objects.
        values: by their commas, one less than there are in each list.
    """

    depth: int
    lists: int
    values: int


def extent_of(body: bytes) -> Extent:
    """How much a JSON text holds, without parsing it.

    What is in strings does not count: a byte is in one where the number of quotes before it is odd.
    """
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    depth = deepest = lists = values = inside = 0
    for start in range(0, len(plain), _PART):
        part = np.frombuffer(plain, np.uint8, min(_PART, len(plain) - start), start)
        outside = (np.cumsum(part == ord('"'), dtype=np.uint8) + inside) % 2 == 0  # modulo 256 keeps what is odd
        steps = _STEPS[part] * outside
        levels = np.cumsum(steps, dtype=np.int32)
        deepest = max(deepest, depth + int(levels.max()))
        depth, inside = depth + int(levels[-1]), int(not outside[-1])
        lists += int(np.count_nonzero(steps == 1))
        values += int(np.count_nonzero(outside & (part == ord(","))))
    return Extent(deepest, lists, values)


def _require_json(headers: Headers, body: bytes) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"the body is {kind[:100] or 'of no type'}, send JSON with content-type: application/json")
    if b"\0" in body[:4]:
        raise ApiError(415, "the body is in UTF-16 or UTF-32, send JSON in UTF-8")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A channel that says the body first."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed
