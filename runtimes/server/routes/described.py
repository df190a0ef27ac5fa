"""What the OpenAPI description says of every address."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorObject(BaseModel):
    """A reply that is not a success."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorObject, "description": "The request is wrong."},
    "5XX": {"model": ErrorObject, "description": "The server failed, is full, starts or ends."},
}
ANTHROPIC_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is wrong."}, "5XX": {"description": "The server failed, is full, or ends."}}
