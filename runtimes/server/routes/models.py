"""``GET /v1/models``: what is served, under all of its names."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter

from ..replies import JsonReply
from ..serving import Serving
from .described import ERRORS


def model_routes(serving: Serving) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["models"], responses=ERRORS)
    created = int(time.time())

    def told(name: str) -> dict[str, Any]:
        seen = ["text", "image"] if serving.config.vision else ["text"]
        return {"id": name, "object": "model", "created": created, "owned_by": "herdgraph", "root": serving.model,
                "parent": None, "max_model_len": serving.context, "input_modalities": seen,
                "output_modalities": ["text"]}

    @router.get("/v1/models", summary="What is served")
    async def models() -> JsonReply:
        return JsonReply({"object": "list", "data": [told(name) for name in serving.options.names]})

    @router.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> JsonReply:
        serving.require_model(name)
        return JsonReply(told(name))

    return router
