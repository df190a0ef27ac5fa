"""Chat messages as people and tools give them, checked and copied: text, numbers, lists and dictionaries only."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import HerdError, shown
from .frames import Frame, FrameSampling

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool", "ipython")
MOST_MESSAGES = 100_000
"""Messages of one prompt; each takes a few tokens of the context."""

_DEEPEST = 100
_FILES = (str, Path, bytes, bytearray, memoryview)
_PICTURES = (*_FILES, np.ndarray, Image.Image, Frame)
_KNOWN = "known are text, image, image_url, video and video_url"


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages in the form templates expect: contents are strings, or lists of text, image and video parts.

    A message with tool calls may have no content; all other fields stay as they are. Lists of texts alone become
    strings, since templates of text models print nothing else. Checked messages pass as they are.

    Raises:
        HerdError: what is wrong, with the index of the message.
    """
    if not isinstance(messages, Sequence) and messages is not None:
        raise HerdError(f"a prompt is a string or a list of messages, found {type(messages).__name__}")
    if not messages:
        raise HerdError("the prompt is empty: give a text or at least one message")
    if len(messages) > MOST_MESSAGES:
        raise HerdError(f"the prompt has {len(messages)} messages, at most {MOST_MESSAGES} are taken: shorten it")
    checked = [_checked(index, message) for index, message in enumerate(messages)]
    last = checked[-1]
    if last["role"] == "user" and isinstance(last["content"], str) and not last["content"].strip():
        raise HerdError("the prompt is empty: give a text or a picture")
    return checked


def without_pictures(message: Message) -> dict[str, Any]:
    """A copy of a message in which pictures are bare placeholders."""
    if isinstance(message["content"], str):
        return dict(message)
    parts = [dict(part) if part["type"] == "text" else {"type": part["type"]} for part in message["content"]]
    return {**message, "content": parts}


def plain_copy(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of what came from outside, of Python's own types, and of Unicode text only.

    Args:
        value: anything that JSON can hold.
        where: it stands, for the message.
        depth: of lists and dictionaries around it.

    Raises:
        HerdError: another type, half a character, or nested more than 100 deep.
    """
    if isinstance(value, str):
        return require_unicode(str(value))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if depth == _DEEPEST:
        raise HerdError(f"{where} is nested more than {_DEEPEST} deep: make it flatter")
    if isinstance(value, Mapping):
        pairs = ((_key(key, where), plain_copy(item, where, depth + 1)) for key, item in value.items())
        return dict(pairs)
    if isinstance(value, (list, tuple)):
        return [plain_copy(item, where, depth + 1) for item in value]
    raise HerdError(f"{where} holds a {type(value).__name__}: give text, numbers, lists and dictionaries")


def size_of(value: Any) -> int:
    """Bytes of a plain copy, about."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return 64 + sum(size_of(key) + size_of(item) for key, item in value.items())
    return 64 + sum(map(size_of, value)) if isinstance(value, list) else 16


def require_unicode(text: str) -> str:
    """The text itself.

    Raises:
        HerdError: it holds half a character, as bytes that are not UTF-8 become in Python.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise HerdError(f"the text holds {found!r}, which is no Unicode character: give it in UTF-8") from error
    return text


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise HerdError(f"{where} has a {type(key).__name__} as key, keys are strings")
    return require_unicode(str(key))


def _checked(index: int, message: Any) -> dict[str, Any]:
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise HerdError(f"{where} is a {type(message).__name__}, a dictionary with role and content is needed")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise HerdError(f"{where} has role {shown(role)}, known are {', '.join(ROLES)}")
    if isinstance(content, str):
        return dict(message)
    if role == "assistant" and message.get("tool_calls") and not content:
        return {**message, "content": ""}
    if not isinstance(content, list) or not content:
        raise HerdError(f"{where} has no content: give a string or a list of parts")
    parts = [_checked_part(f"{where}, part {number}", part) for number, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return {**message, "content": "".join(part["text"] for part in parts)}
    return {**message, "content": parts}


def _checked_part(where: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise HerdError(f"{where} has type {shown(kind)}, {_KNOWN}")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise HerdError(f"{where} is text without a 'text' string")
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        return {"type": "image", "source": _from_url(where, "an image_url", part.get("image_url"))}
    if kind == "image":
        source = _source(where, "an image", part)
        if not isinstance(source, _PICTURES):
            raise HerdError(f"{where} is an image given as {type(source).__name__}: give a path, the bytes of a file, "
                            "a Pillow image or an array")
        return {"type": "image", "source": source}
    if kind in ("video", "video_url"):
        return _checked_video(where, part, kind)
    raise HerdError(f"{where} has type {shown(kind)}, {_KNOWN}")


def _checked_video(where: str, part: Message, kind: str) -> dict[str, Any]:
    """A video that is still to be decoded: its source, and which of its frames are taken."""
    given = part.get("video_url") if kind == "video_url" else part
    try:
        sampling = FrameSampling.of(given) if isinstance(given, Mapping) else FrameSampling()
    except HerdError as error:
        raise HerdError(f"{where}: {error}") from error
    if kind == "video_url":
        return {"type": "video", "source": _from_url(where, "a video_url", given), "sampling": sampling}
    source = _source(where, "a video", part)
    if not isinstance(source, (*_FILES, list, tuple)):
        raise HerdError(f"{where} is a video given as {type(source).__name__}: give a path, the bytes of a file, or a "
                        "list of frames")
    return {"type": "video", "source": source, "sampling": sampling}


def _source(where: str, what: str, part: Message) -> Any:
    names = ("path", what.split()[1], "data", "source")
    source = next((part[name] for name in names if part.get(name) is not None), None)
    if source is None:
        raise HerdError(f"{where} is {what} without '{names[0]}', '{names[1]}' or '{names[2]}'")
    return source


def _from_url(where: str, what: str, given: Any) -> bytes:
    """The bytes of a ``data:`` URL, as OpenAI's messages carry pictures; nothing is fetched."""
    url = given.get("url") if isinstance(given, Mapping) else given
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise HerdError(f"{where} has {what} that is no data:...;base64, URL: nothing is fetched from elsewhere, "
                        f"give the {'picture' if 'image' in what else 'video'} itself")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HerdError(f"{where} has {what} whose base64 is broken: {error}") from error
