"""Around every request: its id, its record, the metrics of HTTP, and one line of JSON when it has ended."""

from __future__ import annotations

import json
import re
import uuid
from typing import TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .records import Record

_HARMLESS = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class RequestLog:
    """ASGI middleware, the outermost.

    Args:
        app: what answers.
        metrics: counts.
        lines: takes one line per request, None for none.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, lines: TextIO | None) -> None:
        self.app, self.metrics, self.lines = app, metrics, lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a record."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = Record(_request_id(Headers(scope=scope)), scope["method"], scope["path"][:200])
        scope["herdgraph.record"] = record

        async def labeled(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        try:
            await self.app(scope, receive, labeled)
        finally:
            self._ended(record, scope)

    def _ended(self, record: Record, scope: Scope) -> None:
        record.status = record.status or 499  # the client went before there was a reply
        route = scope.get("route")
        self.metrics.count_http(record, getattr(route, "path", "none"))
        if record.usage:
            self.metrics.count_generation(record)
        if self.lines is not None:
            print(json.dumps(record.to_json()), file=self.lines, flush=True)


def _request_id(headers: Headers) -> str:
    """The client's, where it can stand in a header and in a log."""
    given = headers.get("x-request-id", "")
    return given if _HARMLESS.fullmatch(given) else uuid.uuid4().hex
