"""``POST /tokenize`` and ``/detokenize`` in vLLM's form, and ``POST /v1/chat/completions/render``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ....model.processing import PreparedPrompt
from ..answering import check_body
from ..generation_plan import check_chat, offered_tools
from ..parsing import ParsedRoute
from ..prompts import chat_prompt, on_thread, text_prompt
from ..protocol.chat import RenderBody
from ..protocol.tokens import DetokenizeBody, TokenizeChatBody, TokenizeTextBody
from ..replies import JsonReply
from ..sampling_params import require_known
from ..serving import Serving
from .described import ERRORS


def token_routes(serving: Serving) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["tokens"], responses=ERRORS, route_class=ParsedRoute)

    @router.post("/tokenize", summary="Text or messages to token ids")
    async def tokenize(body: TokenizeTextBody | TokenizeChatBody) -> JsonReply:
        headers = check_body(serving, body)
        if isinstance(body, TokenizeChatBody):
            prompt = await _rendered(serving, body)
        elif body.prompt:
            prompt = await text_prompt(serving, body.prompt, begins=body.add_special_tokens is not False)
        else:
            prompt = PreparedPrompt([])
        ids = prompt.token_ids
        told: dict[str, Any] = {"count": len(ids), "max_model_len": serving.context, "tokens": ids}
        told["token_strs"] = await _texts(serving, ids) if body.return_token_strs else None
        return JsonReply(told, headers=headers)

    @router.post("/detokenize", summary="Token ids to text")
    async def detokenize(body: DetokenizeBody) -> JsonReply:
        headers = check_body(serving, body)

        def text() -> str:
            require_known(body.tokens, serving.config.text.vocab_size, "tokens")
            return serving.processor.tokenizer.decode(body.tokens, skip_special=False)

        return JsonReply({"prompt": await on_thread(serving, text)}, headers=headers)

    @router.post("/v1/chat/completions/render", summary="The prompt of a chat, without running it")
    async def render(body: RenderBody) -> JsonReply:
        headers = check_body(serving, body)
        ids = (await _rendered(serving, body)).token_ids
        decode = serving.processor.tokenizer.decode
        text = await on_thread(serving, lambda: decode(ids, skip_special=False))
        return JsonReply({"prompt": text, "prompt_token_ids": ids, "count": len(ids)}, headers=headers)

    return router


async def _rendered(serving: Serving, body: RenderBody) -> PreparedPrompt:
    check_chat(body)
    return await chat_prompt(serving, body, offered_tools(body))


async def _texts(serving: Serving, ids: list[int]) -> list[str]:
    """The text of every token; bytes that are no character by themselves are replaced."""
    decode = serving.processor.tokenizer.decode
    return await on_thread(serving, lambda: [decode([token], skip_special=False) for token in ids])
