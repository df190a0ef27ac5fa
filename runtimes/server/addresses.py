"""What somebody is told who asks at an address that there is not, or in a way that it does not take."""

from __future__ import annotations

from fastapi import Request
from starlette.exceptions import HTTPException


def what_is_wrong(request: Request, error: HTTPException) -> str:
    """One line for a request that no route takes; often a client's base URL has one ``/v1`` too many, or none."""
    path = request.url.path
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"{path[:200]} does not take {request.method}: use {allowed}"
    if error.status_code != 404:
        return str(error.detail)
    known, bare = request.app.openapi()["paths"], path.rstrip("/")
    meant = next((one for one in (bare, f"/v1{bare}", bare.removeprefix("/v1")) if one in known), None)
    hint = f"did you mean {meant}?" if meant else "GET /openapi.json lists what there is"
    return f"there is nothing at {path[:200]}: {hint}"
