"""Body of ``/v1/completions``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .common import GenerationBody

MOST_PROMPTS = 256

Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]
PromptList = Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
IdsList = Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]


class CompletionBody(GenerationBody):
    """A text that the model continues."""

    prompt: str | PromptList | Ids | IdsList = Field(description="One text or several, or their token ids.")
    max_tokens: int | None = Field(16, ge=0, description="0 together with echo.")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=100)
    add_special_tokens: bool | None = Field(None, description="Whether a text begins with begin-of-text.")
