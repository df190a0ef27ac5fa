"""``GET /v1/models``: what is served, under all of its names."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter

from ....model.processing import can_read_films
from ..replies import JsonReply
from ..serving import Serving
from .described import ERRORS


def _inputs(serving: Serving) -> list[str]:
    """What messages may hold; video where films are read, animated GIF and WebP need nothing installed."""
    if not serving.config.vision:
        return ["text"]
    return ["text", "image", "video"] if can_read_films() else ["text", "image"]


def model_routes(serving: Serving) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["models"], responses=ERRORS)
    created = int(time.time())

    def told(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "herdgraph", "root": serving.model,
                "parent": None, "max_model_len": serving.context, "input_modalities": _inputs(serving),
                "output_modalities": ["text"]}

    @router.get("/v1/models", summary="What is served")
    async def models() -> JsonReply:
        return JsonReply({"object": "list", "data": [told(name) for name in serving.options.names]})

    @router.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> JsonReply:
        serving.require_model(name)
        return JsonReply(told(name))

    return router
