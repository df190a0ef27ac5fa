"""Addresses that OpenAI's and vLLM's servers have and this one does not: a clear no in the place of a riddle."""

from __future__ import annotations

from fastapi import APIRouter

from ..errors import ApiError

PATHS = (
    "/v1/embeddings", "/v1/rerank", "/rerank", "/v2/rerank", "/v1/score", "/score", "/v1/moderations", "/pooling",
    "/classify", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech", "/v1/images/generations",
    "/v1/images/edits", "/v1/files", "/v1/batches", "/v1/fine_tuning/jobs", "/v1/assistants", "/v1/threads",
    "/v1/realtime", "/v1/load_lora_adapter", "/v1/messages/batches", "/v1/responses/{id}", "/v1/responses/{id}/cancel",
    "/v1/responses/{id}/input_items",
)


def unsupported_routes() -> APIRouter:
    """The routes."""
    router = APIRouter()

    async def refuse() -> None:
        raise ApiError(404, "this server does not do that: it chats and completes", code="unsupported")

    for path in PATHS:
        router.add_api_route(path, refuse, methods=["GET", "POST"], include_in_schema=False)
    return router
