"""Every reply that is not a success carries an error object, OpenAI's or, below ``/v1/messages``, Anthropic's.

======  =======================  ========================================================
status  code                     when
======  =======================  ========================================================
400     (several)                the request is wrong; never 422
401     invalid_api_key          no key, or another one
404     model_not_found          or ``unsupported``, or ``not_found`` for any other address
405     method_not_allowed       GET in the place of POST
408     request_timeout          the body came too slowly
413     request_too_large        the body is too long
415     unsupported_media_type   the body is no JSON
429     rate_limit_exceeded      too many requests at the same time with this key
500     server_error             a defect
503     overloaded               the queue is full, or the server starts or ends
======  =======================  ========================================================
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import HerdError, TooLongError
from .addresses import what_is_wrong
from .replies import JsonReply

M = TypeVar("M", bound=BaseModel)

log = logging.getLogger(__name__)

_CODES = {
    401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 408: "request_timeout",
    413: "request_too_large", 415: "unsupported_media_type", 429: "rate_limit_exceeded", 500: "server_error",
    503: "overloaded",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
}
_KIND = re.compile(r"str|.*\[.*|[A-Z].*", re.DOTALL)
_LONGEST = 1000
_MOST_PROBLEMS = 3


class ApiError(Exception):
    """A reply that is not a success.

    Args:
        status: of HTTP.
        message: one line for people; cut after 1000 characters, since it may repeat what was sent.
        code: for programs; by default what the status means.
        param: field of the request that is wrong.
        retry_after: seconds after which asking again makes sense.
        headers: further ones.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        retry_after: float | None = None, headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param = status, param
        self.message = " ".join(message.split())[:_LONGEST]
        self.code = _CODES.get(status) if code is None else code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, round(retry_after)))

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """Anthropic's error object."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def wrong(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong."""
    return ApiError(400, message, param=param, code=code)


def validated(kind: type[M], given: Mapping[str, Any], param: str) -> M:
    """A body that another one was made into.

    Raises:
        ApiError: it says what this kind cannot, in the field ``param`` of the original.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise wrong(f"{param}: {error.errors()[0]['msg']}"[:_LONGEST], param) from error


def of_herd_error(error: HerdError, param: str | None = None) -> ApiError:
    """What the engine's own checks refused."""
    code = "context_length_exceeded" if isinstance(error, TooLongError) else None
    return wrong(str(error), param, code)


def error_reply(path: str, error: ApiError) -> JsonReply:
    """The reply, in the form that clients of an address expect."""
    body = error.anthropic_body() if path.startswith("/v1/messages") else error.body()
    return JsonReply(body, error.status, error.headers)


def install(app: FastAPI) -> None:
    """Give every exception of a route its reply."""

    def reply(request: Request, error: Exception) -> JsonReply:
        return error_reply(request.url.path, _api_error(request, error))

    for kind in (ApiError, HerdError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, reply)


def _api_error(request: Request, error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HerdError):
        return of_herd_error(error)
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, what_is_wrong(request, error), headers=error.headers)


def _invalid(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """What is wrong with the fields of a request; their values are not repeated."""
    places: dict[str, list[str]] = {}
    for problem in problems:
        places.setdefault(_place(problem), []).append(_told(problem))
    told = [f"{place or 'body'}: {' or '.join(dict.fromkeys(reasons))}"[:300] for place, reasons in places.items()]
    more = len(told) - _MOST_PROBLEMS
    message = "; ".join(told[:_MOST_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
    return wrong(message, next(iter(places)) or None)


def _told(problem: Mapping[str, Any]) -> str:
    detail = problem.get("ctx", {}).get("error", "") if problem["type"] == "json_invalid" else ""
    return f"{problem['msg']}{f' ({detail})' if detail else ''}"


def _place(problem: Mapping[str, Any]) -> str:
    """The field, without the names that pydantic gives to the kinds of value that it may have."""
    if problem["type"] == "json_invalid":
        return ""
    steps = [str(step) for step in problem["loc"] if step != "body"]
    return ".".join(step for step in steps if not _KIND.fullmatch(step))[:100]


class Recover:
    """ASGI middleware: a defect is logged, and becomes a reply where none has begun."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("a request failed")
            if scope["type"] != "http" or started:
                raise
            refusal = error if isinstance(error, ApiError) else ApiError(500, "the server failed: see its log")
            await error_reply(scope["path"], refusal)(scope, receive, send)
