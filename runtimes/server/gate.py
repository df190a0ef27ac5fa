"""Who may come in: nobody while the model loads or the server ends, then those with a key, so many at a time."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError, error_reply
from .keys import METRICS, Key
from .records import record_of
from .serving import Serving

OPEN = frozenset(("/", "/health", "/ready"))
"""Addresses that everybody may see at any time."""
_ANY_TIME = OPEN | {"/metrics", "/version", "/openapi.json"}


class Gate:
    """ASGI middleware.

    Args:
        app: behind it.
        serving: knows the keys and whether the server is open.
    """

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self.app, self.serving = app, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in or refuse it."""
        if scope["type"] != "http" or scope["path"] in OPEN or scope["method"] == "OPTIONS":
            await self.app(scope, receive, send)
            return
        try:
            key = self._key(scope)
            if scope["path"] not in _ANY_TIME:
                self.serving.require_open()
            if key is not None and key.running >= self.serving.options.key_requests:
                self.serving.metrics.count_rejection("key_limit")
                raise ApiError(429, f"this key has {key.running} requests running, which is the most that one may have",
                               retry_after=1)
        except ApiError as error:
            await error_reply(scope["path"], error)(scope, receive, send)
            return
        await self._counted(key, scope, receive, send)

    def _key(self, scope: Scope) -> Key | None:
        """The key of a request, None where none is needed."""
        keys, metrics = self.serving.keys, scope["path"] == "/metrics"
        if keys is None or (metrics and not keys.guard_metrics):
            return None
        key = keys.find(Headers(scope=scope))
        if key.name == METRICS and not metrics:
            raise ApiError(401, "this API key opens /metrics only")
        return key

    async def _counted(self, key: Key | None, scope: Scope, receive: Receive, send: Send) -> None:
        """Run a request, which counts on its key."""
        if key is None:
            await self.app(scope, receive, send)
            return
        scope["herdgraph.key"], record_of(scope).key = key, key.name
        key.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            key.running -= 1
