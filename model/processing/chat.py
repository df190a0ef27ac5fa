"""Chat messages to a prompt, by the checkpoint's own template or by Meta's format.

Templates come with checkpoints, so they run in a sandbox. The text of messages cannot forge special tokens: when one
occurs in it, the message is rendered with a placeholder and its text is encoded by itself, as ordinary characters. In
that case, and only then, whatever the template does to the text (trimming, say) is not done.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...errors import HerdError
from ...reading import read_optional_json
from .tokenizer import Tokenizer, token_text

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool", "ipython")

META_FORMAT = (
    "{{ bos_token }}{% for message in messages %}"
    "<|header_start|>{{ 'ipython' if message.role == 'tool' else message.role }}<|header_end|>\n\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{{ '<|eom|>' if message.role in ('tool', 'ipython') else '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)
"""Meta's prompt format (llama-models ``chat_format.py``) as a template."""

# Private-use characters that no tokenizer, template or sensible text contains.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"


class _Generation(Extension):
    """Accepts ``{% generation %}``, with which some templates mark what was generated; it changes nothing here."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: jinja2 text.
        variables: values such as ``bos_token`` that the template may use.

    Raises:
        HerdError: on construction, when the template cannot be parsed.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise, strftime_now=_now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise HerdError(f"the checkpoint's chat template cannot be parsed: {error}") from error
        self._variables = dict(variables)

    @classmethod
    def from_directory(cls, directory: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template of a checkpoint, Meta's format for a Llama 4 vocabulary without one, or None.

        Raises:
            HerdError: a template is there and cannot be read.
        """
        settings = tokenizer.settings
        source = _template_source(directory, settings.get("chat_template"))
        if source is None and tokenizer.token_to_id("<|header_start|>") is not None:
            source = META_FORMAT
            settings = {"bos_token": "<|begin_of_text|>"} | settings
        if source is None:
            return None
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return cls(source, {name: token_text(settings.get(name)) or "" for name in names})

    def render(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None) -> str:
        """The prompt text, ending where the assistant's answer begins.

        Raises:
            HerdError: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=True, **self._variables
            )
        except Exception as error:  # a template is a program of the checkpoint: it may fail in any way
            raise HerdError(f"the chat template refuses these messages: {error}") from error

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Token ids of the rendered messages, special tokens from the template only."""
        texts: list[str] = []

        def protect(text: str) -> str:
            if not tokenizer.contains_special(text):
                return text
            texts.append(text)
            return f"{_OPEN}{len(texts) - 1}{_CLOSE}"

        rendered = self.render([_map_text(message, protect) for message in messages], tools=tools)
        ids: list[int] = []
        # Of a split by one group, every second part is what the group matched: the number of a protected text.
        for index, part in enumerate(re.split(f"{_OPEN}(\\d+){_CLOSE}", rendered)):
            if index % 2:
                ids += tokenizer.encode(texts[int(part)])
            elif part:
                ids += tokenizer.encode(part, allow_special=True)
        return ids


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages in the form templates expect: contents are strings, or lists of text and image parts.

    Lists without an image become strings, since templates of text models print nothing else.

    Raises:
        HerdError: what is wrong, with the index of the message.
    """
    if not messages:
        raise HerdError("the prompt is empty: give a text or at least one message")
    if not isinstance(messages, Sequence):
        raise HerdError(f"a prompt is a string or a list of messages, found {type(messages).__name__}")
    checked = [_checked(index, message) for index, message in enumerate(messages)]
    last = checked[-1]
    if last["role"] == "user" and isinstance(last["content"], str) and not last["content"].strip():
        raise HerdError("the prompt is empty: give a text or a picture")
    return checked


def _checked(index: int, message: Any) -> dict[str, Any]:
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise HerdError(f"{where} is a {type(message).__name__}, a dictionary with role and content is needed")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise HerdError(f"{where} has role {role!r}, known are {', '.join(ROLES)}")
    if isinstance(content, str):
        return dict(message)
    if not isinstance(content, list) or not content:
        raise HerdError(f"{where} has no content: give a string or a list of parts")
    parts = [_checked_part(f"{where}, part {number}", part) for number, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return {**message, "content": "".join(part["text"] for part in parts)}
    return {**message, "content": parts}


def _checked_part(where: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise HerdError(f"{where} is text without a 'text' string")
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        source = next((part[name] for name in ("path", "image", "data") if part.get(name) is not None), None)
        if source is None:
            raise HerdError(f"{where} is an image without 'path', 'image' or 'data'")
        return {"type": "image", "source": source}
    raise HerdError(f"{where} has type {kind!r}, known are text and image")


def _map_text(message: Message, change: Any) -> dict[str, Any]:
    """A copy of a message with every text of its content changed; images become bare placeholders."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": change(content)}
    parts = [
        {"type": "text", "text": change(part["text"])} if part["type"] == "text" else {"type": "image"}
        for part in content
    ]
    return {**message, "content": parts}


def _template_source(directory: Path, configured: Any) -> str | None:
    if (path := directory / "chat_template.jinja").is_file():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise HerdError(f"{path} is not UTF-8 text: get it again") from error
    configured = read_optional_json(directory / "chat_template.json").get("chat_template", configured)
    if isinstance(configured, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in configured if isinstance(entry, Mapping)}
        configured = named.get("default", next(iter(named.values()), None))
    if configured is not None and not isinstance(configured, str):
        raise HerdError(f"{directory} has a {type(configured).__name__} as chat template, a text is needed")
    return configured


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """``json.dumps`` without HTML escapes, as transformers' templates expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)
