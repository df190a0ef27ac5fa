"""Bodies of ``/v1/messages`` and ``/v1/messages/count_tokens``, in Anthropic's form."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .common import MOST_STOPS, MOST_TOOLS, Body, ModelBody


class TextBlock(Body):
    """A text; ``cache_control`` is not needed here, since every prefix is kept."""

    type: Literal["text"]
    text: str


class ImageSource(Body):
    """A picture in base64, or its URL."""

    type: Literal["base64", "url"]
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class ImageBlock(Body):
    """A picture."""

    type: Literal["image"]
    source: ImageSource


class ToolUseBlock(Body):
    """A call in an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Body):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Annotated[TextBlock | ImageBlock, Field(discriminator="type")]] | None = None
    is_error: bool | None = None


class ThinkingBlock(Body):
    """Thoughts of another model: left out."""

    type: Literal["thinking", "redacted_thinking"]


Block = Annotated[TextBlock | ImageBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")]


class AnthropicMessage(Body):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(Body):
    """A tool; those that Anthropic runs itself have another type and no schema, and are refused."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None


class ToolChoice(Body):
    """Whether, or which, tool has to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Body):
    """What an answer must be."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] | bool = Field(alias="schema")


class OutputConfig(Body):
    """How an answer is; ``effort`` changes nothing."""

    format: OutputFormat | None = None


class CountBody(ModelBody):
    """Messages whose tokens are counted."""

    model: str
    messages: Annotated[list[AnthropicMessage], Field(fail_fast=True)] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[AnthropicTool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: ToolChoice | None = None


class MessagesBody(CountBody):
    """A message to answer."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = Field(None, max_length=MOST_STOPS)
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=0)
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(None, description="As in output_config, where older clients have it.")
