"""Body of ``/v1/responses``: what a server without memory can answer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .chat import Function
from .common import MOST_TOOLS, Body, ModelBody


class ResponseTool(Function):
    """A function; in this API its fields lie beside the type."""

    type: Literal["function"]


class NamedFunction(Body):
    """The one that has to be called."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextSettings(Body):
    """Settings of the text."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesBody(ModelBody):
    """A response."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(None, ge=0, le=100)
    tools: list[ResponseTool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    stream: bool | None = None
    store: bool | None = Field(None, description="Nothing is kept, whatever it says.")
    previous_response_id: str | None = Field(None, description="Refused: nothing is kept.")
    conversation: Any = Field(None, description="Refused: nothing is kept.")
    background: bool | None = Field(None, description="Refused where true.")
    metadata: dict[str, Any] | None = None
