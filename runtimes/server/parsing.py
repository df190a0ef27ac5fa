"""Large bodies are parsed on a thread, so that other requests are answered meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from anyio import to_thread
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

LARGE = 1 << 16
"""Bytes from which on looking into a body takes long enough to be done on a thread."""


class ParsedRoute(APIRoute):
    """A route whose body is parsed beside the event loop where it is large."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler, on a request that parses so."""
        handle = super().get_route_handler()

        async def handle_parsed(request: Request) -> Response:
            return await handle(_Parsed(request.scope, request.receive))

        return handle_parsed


class _Parsed(Request):
    """FastAPI asks it for ``json`` once."""

    async def json(self) -> Any:
        """The body as Python's own values."""
        body = await self.body()
        return await to_thread.run_sync(parsed, body) if len(body) > LARGE else json.loads(body)


def parsed(body: bytes) -> Any:
    """The value of a JSON text, for threads.

    Python's parser is one call, during which no other thread runs; numbers, of which there may be millions, are read by
    functions of Python, between which others have their turn.

    Raises:
        ValueError: it is no JSON.
    """
    return json.loads(body, parse_int=_int, parse_float=_float)


def _int(text: str) -> int:
    return int(text)


def _float(text: str) -> float:
    return float(text)
