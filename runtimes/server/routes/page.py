"""``GET /``: a page to chat with, one file. Its scripts and styles run because the policy has their hashes."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

PAGE = Path(__file__).parents[1] / "page" / "index.html"


def page_routes() -> APIRouter:
    """The route."""
    router = APIRouter()
    content = PAGE.read_bytes()
    headers = {"content-security-policy": policy(content.decode()), "x-content-type-options": "nosniff",
               "referrer-policy": "no-referrer", "cache-control": "no-cache"}

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(content, media_type="text/html", headers=headers)

    return router


def policy(html: str) -> str:
    """What a page may do: its own scripts and styles, this server, what it was given to show. No attributes."""
    scripts, styles = (_hashes(html, tag) for tag in ("script", "style"))
    return (f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src 'self' data: "
            "blob:; media-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def _hashes(html: str, tag: str) -> str:
    found = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
