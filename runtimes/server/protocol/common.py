"""What the bodies of several endpoints share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_STOPS = 16
MOST_CHOICES = 64
MOST_TOOLS = 256

Count = Annotated[int, Field(ge=1, le=MOST_CHOICES)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
"""Of a million wrong ids the first is told: describing all takes seconds."""
Stop = str | Annotated[list[str], Field(max_length=MOST_STOPS)]


class Body(BaseModel):
    """Any JSON object; values are of their own kind, a number is no string. Unknown fields are looked at later."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


class ModelBody(Body):
    """A body that says which model is meant."""

    model: str | None = None


class StreamOptions(Body):
    """How a stream tells its usage."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(Body):
    """What an answer must be, one of these."""

    json_: dict[str, Any] | bool | str | None = Field(None, alias="json", description="A JSON schema, or its text.")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = Field(None, description="A grammar in Lark's form.")
    json_object: bool | None = None
    structural_tag: Any = Field(None, description="Refused.")


class JsonSchema(Body):
    """A schema with its name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingBody(ModelBody):
    """How tokens are chosen, and when an answer ends: OpenAI's fields and vLLM's."""

    temperature: float | None = Field(None, description="0 is greedy. Default: the checkpoint's, else 1.")
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, description="0 or -1 keeps all.")
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, description="By token id, within -100 and 100.")
    allowed_token_ids: TokenIds | None = None
    bad_words: list[str] | None = Field(None, max_length=256)
    seed: int | None = None
    stop: Stop | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=256)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = Field(None, description="False: texts show control tokens, but the last one.")
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)


class GenerationBody(SamplingBody):
    """What chats and completions have in common."""

    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0)
    prompt_logprobs: int | None = Field(None, ge=0, le=100)
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="Only so many tokens at the end of the prompt are read; -1: as many as fit.")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: int | None = Field(None, ge=-100, le=100, description="Smaller goes first.")
    cache_salt: str | None = Field(None, max_length=256, description="Prefixes are shared among equal ones only.")
