"""Messages and texts of a request to tokens and tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from anyio import to_thread

from ...errors import HerdError
from ...model.processing import FrameSampling, PreparedPrompt
from .errors import of_herd_error, wrong
from .images import fetch
from .protocol.chat import ChatMessage, Content, RenderBody, TextContent, VideoContent
from .sampling_params import require_known
from .serving import Serving
from .toolkit import Tool

T = TypeVar("T")

_TO_SHORTEN = 16
"""So many times longer than the context a prompt may be of which only the end is read."""


async def on_thread(serving: Serving, work: Callable[[], T], param: str | None = None) -> T:
    """Do what takes long beside the event loop, for a few requests at the same time.

    Raises:
        ApiError: the work raised a ``HerdError``.
    """
    async with serving.preparing:
        try:
            return await to_thread.run_sync(work)
        except HerdError as error:
            raise of_herd_error(error, param) from error


async def chat_prompt(
    serving: Serving, body: RenderBody, tools: list[Tool], keep: int | None = None
) -> PreparedPrompt:
    """Tokens and tiles of a chat.

    Args:
        serving: knows the model.
        body: has the messages, and says how the template renders them.
        tools: that the model may call.
        keep: most tokens, of which those at the end stay; None for all.

    Raises:
        ApiError: too many pictures or frames, or what the template and the processor refuse.
    """
    plain = [plain_message(index, message) for index, message in enumerate(body.messages)]
    continue_final = bool(body.continue_final_message)
    await _fetch_shown(serving, plain)
    final = _final_text(plain) if continue_final else ""

    def prepare() -> PreparedPrompt:
        prepared = _prepared(serving, plain[:-1] if continue_final else plain, tools, body.chat_template_kwargs, keep)
        more = serving.processor.tokenizer.encode(final) if final else []
        return _shortened(PreparedPrompt([*prepared.token_ids, *more], prepared.pixel_values), keep)

    return await on_thread(serving, prepare, "messages")


async def text_prompt(
    serving: Serving, prompt: str | list[int], *, begins: bool = True, keep: int | None = None
) -> PreparedPrompt:
    """Tokens of a text that is continued; those that were encoded already are checked.

    Args:
        serving: knows the model.
        prompt: text or token ids.
        begins: whether begin-of-text comes first.
        keep: most tokens, of which those at the end stay; None for all.

    Raises:
        ApiError: it is empty, or has a token that no text has.
    """

    def prepare() -> PreparedPrompt:
        if isinstance(prompt, list):
            ids = prompt
        elif begins:
            ids = serving.processor.prepare(prompt, most_tokens=_most(serving, keep)).token_ids
        else:
            ids = serving.processor.tokenizer.encode(prompt, allow_special=True)
        prepared = _shortened(PreparedPrompt(ids), keep)
        _require_text(serving, prepared.token_ids)
        return prepared

    return await on_thread(serving, prepare, "prompt")


def _require_text(serving: Serving, ids: list[int]) -> None:
    """Refuse tokens that no text has, or none at all."""
    if not ids:
        raise wrong("the prompt is empty: give a text or token ids", "prompt")
    require_known(ids, serving.config.text.vocab_size, "prompt")
    if serving.config.vision and serving.config.image_token_id in ids:
        raise wrong("the prompt has image tokens without an image: pictures belong into a chat's messages", "prompt")


def plain_message(index: int, message: ChatMessage) -> dict[str, Any]:
    """A message as templates take it, with nothing in it that was not asked for.

    Raises:
        ApiError: it has no content, and no calls in its place.
    """
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        raise wrong(f"message {index} has no content: give a string or a list of parts", f"messages.{index}.content")
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": _plain_content(message.content)}
    plain |= {name: value for name in ("name", "tool_call_id") if (value := getattr(message, name)) is not None}
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function",
             "function": {"name": call.function.name, "arguments": call.function.arguments}}
            for call in message.tool_calls]
    return plain


def _plain_content(content: str | list[Content] | None) -> Any:
    if content is None or isinstance(content, str):
        return content or ""
    return [_plain_part(part) for part in content] or ""


def _plain_part(part: Content) -> dict[str, Any]:
    if isinstance(part, TextContent):
        return {"type": "text", "text": part.text}
    if isinstance(part, VideoContent):
        given = part.video_url
        return {"type": "video_url", "video_url": {
            "url": given.url, "fps": given.fps, "max_frames": given.max_frames, "sampling": given.sampling}}
    return {"type": "image_url", "image_url": {"url": part.image_url.url}}


def kept_tokens(serving: Serving, truncate: int | None, asked: int | None) -> int | None:
    """How many tokens of a prompt are kept, None for all.

    Args:
        serving: knows the context.
        truncate: the request's ``truncate_prompt_tokens``; -1 keeps what fits beside the answer.
        asked: tokens that the answer may have, None where it gets what is left.

    Raises:
        ApiError: so many do not fit.
    """
    most = serving.context - max(1, asked or 1)
    if truncate is not None and truncate > most:
        raise wrong(f"truncate_prompt_tokens is {truncate}, {max(0, most)} fit beside the answer",
                    "truncate_prompt_tokens")
    return max(0, most) if truncate == -1 else truncate


def _shortened(prompt: PreparedPrompt, keep: int | None) -> PreparedPrompt:
    """The end of a prompt."""
    before = 0 if keep is None else max(0, len(prompt.token_ids) - keep)
    if before and prompt.pixel_values is not None:
        raise wrong(f"the prompt has {len(prompt.token_ids)} tokens, and one with pictures cannot be cut to {keep}",
                    "truncate_prompt_tokens")
    return PreparedPrompt(prompt.token_ids[before:], prompt.pixel_values)


def _most(serving: Serving, keep: int | None) -> int | None:
    """Tokens that a prompt may have before it is shortened, None for the model's context."""
    return None if keep is None else _TO_SHORTEN * serving.config.text.max_position_embeddings


def _prepared(
    serving: Serving, messages: list[Any], tools: list[Tool], variables: dict[str, Any] | None, keep: int | None
) -> PreparedPrompt:
    if tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        messages, tools = serving.toolkit.prepare_messages(messages, tools)
    return serving.processor.prepare(messages, tools=tools or None, variables=variables,
                                     most_tokens=_most(serving, keep))


async def _fetch_shown(serving: Serving, messages: list[dict[str, Any]]) -> None:
    """Put pictures and videos of other hosts into the messages."""
    mixed = [message["content"] for message in messages if isinstance(message["content"], list)]
    parts = [part for content in mixed for part in content if part["type"] != "text"]
    _require_few(serving, parts)
    for part in parts:
        kind: str = part["type"]
        given: dict[str, Any] = part[kind]
        if not given["url"].startswith("data:"):
            data = await fetch(given.pop("url"), serving.options.image_hosts, kind)
            part.clear()
            part.update(given, type=kind.removesuffix("_url"), data=data)


def _require_few(serving: Serving, parts: list[dict[str, Any]]) -> None:
    options = serving.options
    videos = [part["video_url"] for part in parts if part["type"] == "video_url"]
    if (pictures := len(parts) - len(videos)) > options.images:
        raise wrong(f"the request has {pictures} pictures, at most {options.images} are taken", "messages")
    frames = sum(video["max_frames"] or FrameSampling.max_frames for video in videos)
    if frames > options.frames:
        raise wrong(f"the request's {len(videos)} videos may have {frames} frames, at most {options.frames} are taken: "
                    "give a lower max_frames", "messages")


def _final_text(messages: list[dict[str, Any]]) -> str:
    """What the answer goes on from."""
    final = messages[-1]
    if final["role"] != "assistant" or "tool_calls" in final or not isinstance(final["content"], str):
        raise wrong("continue_final_message needs a last message of the assistant with a text", "messages")
    if len(messages) < 2:
        raise wrong("continue_final_message needs a message before the last one", "messages")
    text: str = final["content"]
    return text
