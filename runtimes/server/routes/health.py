"""Is it alive, does it answer, what does it count, what is it: for operators and their programs."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from ..errors import ApiError
from ..replies import JsonReply
from ..serving import Serving
from .described import ERRORS


def health_routes(serving: Serving) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["operations"], responses=ERRORS)

    @router.get("/health", summary="Whether the server lives, even while it loads or ends")
    async def health() -> JsonReply:
        if serving.failed:
            raise ApiError(503, f"the engine runs no more: {serving.failed}", code="engine_dead")
        return JsonReply({"status": "alive"})

    @router.get("/ready", summary="Whether requests are taken: neither while the model loads nor while it ends")
    async def ready() -> JsonReply:
        if serving.failed:
            raise ApiError(503, f"the engine runs no more: {serving.failed}", code="engine_dead")
        serving.require_open()
        return JsonReply({"status": "ready"})

    @router.get("/metrics", summary="For Prometheus, under the names of vLLM")
    async def metrics() -> Response:
        return Response(serving.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/load", summary="How many prompts there are, and numbers of those of the key that asks")
    async def load(request: Request) -> JsonReply:
        key, running = request.scope.get("herdgraph.key"), serving.running
        told = [run.told() for run in running if serving.keys is None or run.key is key]
        return JsonReply({"server_load": len(running), "requests": sorted(told, key=lambda run: -run["seconds"])})

    @router.get("/version", summary="Of herdgraph")
    async def version() -> JsonReply:
        return JsonReply({"version": serving.options.version})

    return router
