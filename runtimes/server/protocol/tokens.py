"""Bodies of ``/tokenize`` and ``/detokenize``, in vLLM's form."""

from __future__ import annotations

from pydantic import Field

from .chat import RenderBody
from .common import ModelBody, TokenIds


class TokenizeTextBody(ModelBody):
    """A text."""

    prompt: str
    add_special_tokens: bool | None = Field(None, description="Begin-of-text in front, which is the default.")
    return_token_strs: bool | None = None


class TokenizeChatBody(RenderBody):
    """Messages."""

    return_token_strs: bool | None = None


class DetokenizeBody(ModelBody):
    """Token ids."""

    tokens: TokenIds
