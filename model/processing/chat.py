"""Chat messages to a prompt, by the checkpoint's own template or by Meta's format.

A template comes with a checkpoint: it runs in ``sandbox``, within a ``budget``. What people and tools say comes from
strangers too: it never becomes a control token, whatever the template does with it (``control_tokens``).
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ...errors import HerdError
from ...reading import read_optional_json, read_text
from .budget import bounded
from .control_tokens import ControlTokens
from .messages import Message, plain_copy, size_of, without_pictures
from .sandbox import BoundedEnvironment
from .tokenizer import Tokenizer, token_text

META_FORMAT = (
    "{% macro literal(value) %}{% if value is none %}None{% elif value is boolean %}{{ 'True' if value else 'False' }}"
    "{% elif value is mapping %}{{ '{' }}{% for key, item in value.items() %}"
    "{{ ', ' if not loop.first }}{{ key | tojson }}: {{ literal(item) }}{% endfor %}{{ '}' }}"
    "{% elif value is string or value is number %}{{ value | tojson }}"
    "{% else %}[{% for item in value %}{{ ', ' if not loop.first }}{{ literal(item) }}{% endfor %}]{% endif %}"
    "{% endmacro %}"
    "{{ bos_token }}{% for message in messages %}"
    "<|header_start|>{{ 'ipython' if message.role == 'tool' else message.role }}<|header_end|>\n\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{% if message.tool_calls %}[{% for call in message.tool_calls %}{{ ', ' if not loop.first }}"
    "{{ call.function.name }}({% for name, value in call.function.arguments.items() %}"
    "{{ ', ' if not loop.first }}{{ name }}={{ literal(value) }}{% endfor %}){% endfor %}]{% endif %}"
    "{{ '<|eom|>' if message.role in ('tool', 'ipython') or message.tool_calls else '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)
"""Meta's prompt format (llama-models ``chat_format.py``) as a template; calls stand in their pythonic form."""

MOST_CHARACTERS = 128 << 10
"""Longest template; the longest of released models has 20,000 characters."""
_LONGEST_DATE = 100
_TAKEN = ("messages", "tools", "chat_template", "continue_final_message", "tokenize")
"""What callers say otherwise, or what would replace the template."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: jinja2 text.
        variables: texts such as ``bos_token`` that the template may use.
        special_tokens: those of the vocabulary; in the template and its variables they are control tokens.

    Raises:
        HerdError: on construction, when the template cannot be parsed.
    """

    def __init__(self, source: str, variables: Mapping[str, str], special_tokens: Sequence[str] = ()) -> None:
        if len(source) > MOST_CHARACTERS:
            raise HerdError(f"the checkpoint's chat template has {len(source)} characters, at most {MOST_CHARACTERS} "
                            "are read")
        self.source = source
        self._controls = ControlTokens(special_tokens)
        self._variables = {name: self._controls.mark(text) for name, text in variables.items()}
        environment = BoundedEnvironment()
        environment.globals.update(raise_exception=_raise, strftime_now=_now)
        try:
            with bounded():
                tree = environment.parse(source)
                self._controls.mark_literals(tree)
                self._template = environment.compile_bounded(tree)
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, TypeError) as error:
            reason = _one_line(error)
            raise HerdError(f"the checkpoint's chat template cannot be parsed: {reason}") from error

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
        template = cls(source, {name: token_text(settings, name) or "" for name in names}, tokenizer.control_tokens)
        template._require_whole_tokens(tokenizer)
        return template

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text, ending where the assistant's answer begins.

        Raises:
            HerdError: the template refuses the messages or costs too much, or a variable has a name of its own.
        """
        return self._controls.unmark(self._rendered(messages, tools, variables))

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None, most_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of the rendered messages; control tokens are the template's own.

        Args:
            messages: checked ones.
            tokenizer: that of the template's checkpoint.
            tools: descriptions for templates that offer tools.
            variables: further ones that the template may look at, such as ``enable_thinking``.
            most_tokens: a text that must have more is refused before the work is done.

        Raises:
            HerdError: see ``render``; or the text is too long.
        """
        rendered = self._rendered(messages, tools, variables)
        parts = list(self._controls.split(rendered))
        text = "".join(token or text for token, text in parts)
        tokenizer.require_room(text, most_tokens)
        ids = tokenizer.encode(text, allow_special=True)
        written = [tokenizer.token_to_id(token) for token, _ in parts if token]
        if tokenizer.control_ids(ids) == written:
            return ids
        # Somebody typed a special token: the texts between the template's own are encoded by themselves.
        return [index for token, text in parts for index in tokenizer.encode(token or text, allow_special=bool(token))]

    def _require_whole_tokens(self, tokenizer: Tokenizer) -> None:
        """A control token put together of pieces cannot be told from one that somebody typed in pieces."""
        try:
            rendered = self._rendered([{"role": "user", "content": "x"}])
        except HerdError:
            return  # it wants other messages
        parts = list(self._controls.split(rendered))
        whole = {token for token, _ in parts if token}
        text = "".join(token or text for token, text in parts)
        found = set(tokenizer.control_ids(tokenizer.encode(text, allow_special=True)))
        if found - {tokenizer.token_to_id(token) for token in whole}:
            raise HerdError("the checkpoint's chat template puts special tokens together of pieces, which cannot be "
                            "told from what is typed: write each as one literal")

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The rendered text with marks in the place of control tokens."""
        own = {"add_generation_prompt": True, **self._variables}
        given = {
            **self._further(variables or {}, own),
            "messages": [plain_copy(without_pictures(message), f"message {index}")
                         for index, message in enumerate(messages)],
            "tools": None if tools is None else plain_copy(list(tools), "tools"),
        }
        try:
            with bounded(size_of(given)):
                return self._template.render(given, **own)
        except Exception as error:  # a template is a program of the checkpoint: it may fail in any way
            raise HerdError(f"the chat template refuses these messages: {_one_line(error)}") from error


    def _further(self, variables: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Variables from outside, as a plain copy."""
        taken = {*_TAKEN, *own, *self._template.globals}
        if wrong := sorted(taken.intersection(variables)):
            raise HerdError(f"the variable {wrong[0]} of the chat template cannot be given from outside: leave it out")
        plain: dict[str, Any] = plain_copy(variables, "the variables of the chat template")
        return plain


def _template_source(directory: Path, configured: Any) -> str | None:
    if (path := directory / "chat_template.jinja").exists():
        return read_text(path, most=8 * MOST_CHARACTERS)
    configured = read_optional_json(directory / "chat_template.json").get("chat_template", configured)
    if isinstance(configured, list):  # several named templates
        entries = [entry for entry in configured if isinstance(entry, Mapping)]
        named = [entry.get("template") for entry in entries if entry.get("name") == "default"]
        configured = next(iter([*named, *(entry.get("template") for entry in entries)]), None)
    if configured is not None and not isinstance(configured, str):
        raise HerdError(f"{directory} has a {type(configured).__name__} as chat template, a text is needed")
    return configured


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _now(pattern: str) -> str:
    if len(pattern) > _LONGEST_DATE:
        raise ValueError(f"a date's format has more than {_LONGEST_DATE} characters")
    return datetime.datetime.now().astimezone().strftime(pattern)
