"""Around every request: its id, its record, and when it has ended its metrics, its span and one line of JSON."""

from __future__ import annotations

import json
import re
import uuid
from typing import TYPE_CHECKING, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .records import Record

if TYPE_CHECKING:
    from .tracing import Traces

_HARMLESS = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class RequestLog:
    """ASGI middleware, the outermost.

    Args:
        app: what answers.
        metrics: counts.
        lines: takes one line per request, None for none.
        traces: takes requests that generated, None for no spans.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, lines: TextIO | None, traces: Traces | None) -> None:
        self.app, self.metrics, self.lines, self.traces = app, metrics, lines, traces

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
            if self.traces is not None:
                self.traces.add(record, Headers(scope=scope))
        if self.lines is not None:
            print(json.dumps(record.to_json()), file=self.lines, flush=True)


def _request_id(headers: Headers) -> str:
    """The client's, where it can stand in a header and in a log."""
    given = headers.get("x-request-id", "")
    return given if _HARMLESS.fullmatch(given) else uuid.uuid4().hex
