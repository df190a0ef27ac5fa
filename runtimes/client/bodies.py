"""Prompts and options of ``Engine.stream`` as bodies of OpenAI's two requests."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...model.processing import Prompt
from ...model.processing.containers import kind_of
from ...model.processing.messages import plain_copy
from ...model.processing.pictures import MAX_BYTES, load_image
from ...reading import read_bytes

_FIELDS = {"max_new_tokens": "max_tokens", "stop_ids": "stop_token_ids"}
"""Options that these requests call otherwise."""
_KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
"""Formats that every server reads, by their first bytes."""

_VIDEO_KINDS = {"mov": "video/mp4", "matroska": "video/webm", "animation": "video/gif"}


def chat_body(messages: Prompt, options: Mapping[str, Any]) -> dict[str, Any]:
    """Body of a chat: ``messages`` whose pictures and videos are ``data:`` URLs."""
    fields = _fields(options)
    if "logprobs" in fields:
        fields |= {"logprobs": True, "top_logprobs": fields["logprobs"]}
    return {"messages": [_message(message) for message in plain_copy(messages, "the prompt")], **fields}


def completion_body(text: Prompt, options: Mapping[str, Any]) -> dict[str, Any]:
    """Body of a text that is continued."""
    return {"prompt": plain_copy(text, "the prompt"), **_fields(options)}


def data_url(path: Path) -> str:
    """A picture as a URL that contains it: PNG and JPEG as they are, other formats converted.

    Raises:
        HerdError: it cannot be read, or is no picture.
    """
    content = read_bytes(path, most=MAX_BYTES)
    picture = load_image(path)
    kind = next((kind for start, kind in _KINDS.items() if content.startswith(start)), None)
    if kind is None:
        kind, content = "image/png", _png(picture)
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def video_url(path: Path) -> str:
    """A video as a URL that contains it.

    Raises:
        HerdError: it cannot be read, is cut off, or no video.
    """
    content = read_bytes(path, most=MAX_BYTES)
    kind = _VIDEO_KINDS[kind_of(io.BytesIO(content), str(path))]
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _png(picture: Any) -> bytes:
    written = io.BytesIO()
    picture.save(written, "PNG")
    return written.getvalue()


def _fields(options: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    return {_FIELDS.get(name, name): plain_copy(value, name) for name, value in given.items()}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(message["content"], str):
        return dict(message)
    return {**message, "content": [_part(part) for part in message["content"]]}


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "video":
        return {"type": "video_url", "video_url": part["video"]}
    return dict(part) if part["type"] == "text" else {"type": "image_url", "image_url": {"url": part["image"]}}
