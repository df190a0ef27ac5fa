"""Bodies of ``/v1/chat/completions`` and ``/v1/chat/completions/render``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .common import MOST_TOOLS, Body, GenerationBody, ModelBody


class ImageUrl(Body):
    """Where a picture is; ``detail`` changes nothing."""

    url: str
    detail: str | None = None


class TextContent(Body):
    """A text."""

    type: Literal["text"]
    text: str


class ImageContent(Body):
    """A picture: a ``data:`` URL, or one of a host that the operator allows."""

    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(Body):
    """Where a video is, and which of its frames are looked at."""

    url: str
    fps: float | None = Field(None, gt=0, le=1000)
    max_frames: int | None = Field(None, ge=1)
    sampling: Literal["uniform", "keyframes"] | None = None


class VideoContent(Body):
    """A video: a ``data:`` URL, or one of a host that the operator allows."""

    type: Literal["video_url"]
    video_url: VideoUrl


Content = Annotated[TextContent | ImageContent | VideoContent, Field(discriminator="type")]


class FunctionCall(Body):
    """What the model called; arguments are JSON text."""

    name: str
    arguments: str = "{}"


class ToolCall(Body):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Content] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Body):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(Body):
    """A tool."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """The one that has to be called."""

    type: Literal["function"]
    function: FunctionName


class RenderBody(ModelBody):
    """Messages, as a chat has them."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(min_length=1)
    tools: list[ChatTool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables that the chat template looks at.")
    continue_final_message: bool | None = Field(None, description="The answer goes on from the last message.")


class ChatBody(GenerationBody, RenderBody):
    """A chat completion."""

    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=100)
    parallel_tool_calls: bool | None = None
