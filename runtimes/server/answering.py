"""How every route that generates begins and ends: its body is checked, its prompts run, its reply goes out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Scope

from ..scheduler import GenerationRequest
from .errors import ApiError
from .events import EventStream
from .protocol.common import ModelBody
from .replies import JsonReply
from .runs import Run
from .serving import Serving
from .unknown_fields import check_unknown


class Reply(Protocol):
    """What an API makes of the answers to a request."""

    async def whole(self) -> dict[str, Any]:
        """The reply in one piece."""

    def events(self) -> AsyncGenerator[bytes, None]:
        """The reply as events."""

    def failure(self, error: ApiError) -> bytes:
        """How its stream ends where it failed."""


def check_body(serving: Serving, body: ModelBody) -> dict[str, str]:
    """Look at what every request has: its model, and fields that nobody knows.

    Returns:
        Headers for the reply.

    Raises:
        ApiError: another model, or a field that cannot be ignored.
    """
    headers = check_unknown(body)
    serving.require_model(body.model)
    return headers


async def answer(
    serving: Serving, scope: Scope, requests: Sequence[GenerationRequest], reply_of: Callable[[list[Run]], Reply], *,
    stream: bool | None, headers: Mapping[str, str],
) -> Response:
    """Run the prompts of a request, and send the reply, whole or while it grows.

    Args:
        serving: has the service.
        scope: of the HTTP request.
        requests: one per prompt.
        reply_of: makes the reply of their runs.
        stream: whether it is sent while it grows.
        headers: of the reply.

    Raises:
        ApiError: the queue is full, a request can never run, or an answer failed.
    """
    with ExitStack() as running:
        reply = reply_of([running.enter_context(Run(serving, scope, one)) for one in requests])
        if stream:
            return EventStream(reply.events(), running.pop_all(), serving.options, reply.failure, headers)
        return JsonReply(await reply.whole(), headers=headers)
