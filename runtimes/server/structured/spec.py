"""What an answer may be, as it is asked for: a description that can be compared and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

from ....errors import HerdError, shown
from ....model.processing.messages import require_unicode
from ..schema_checks import MOST_BYTES, checked_schema, require_size
from ..tools.definitions import checked_tools
from ..tools.formats import ToolChoice, call_grammar, calls_alone_grammar, no_calls_grammar
from ..tools.openings import Format

MOST_CHOICES = 4096
"""Alternatives of ``choice``."""


@dataclass(frozen=True)
class GrammarSpec:
    """A form that answers are to have; see the constructors.

    Attributes:
        kind: the language of ``text``.
        text: a JSON schema, a regular expression or a Lark grammar. In the grammar of tools the tokens around calls
            stand as ``<|python_start|>`` and ``<|python_end|>``, which not every vocabulary has.
    """

    kind: Literal["json", "regex", "lark", "tools"]
    text: str

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all that it says."""
        return hashlib.sha256(f"{self.kind}\0{self.text}".encode()).digest()

    @classmethod
    def json_object(cls) -> Self:
        """Any JSON object."""
        return cls("json", '{"type": "object"}')

    @classmethod
    def json_schema(cls, schema: Any) -> Self:
        """JSON of a schema, properties in its order.

        Raises:
            HerdError: it is no schema, too large or too deep, or says what would not be enforced.
        """
        return cls("json", json.dumps(checked_schema(schema)))

    @classmethod
    def regex(cls, pattern: Any) -> Self:
        """What a regular expression matches from the first to the last character.

        Raises:
            HerdError: it is no text, or too long.
        """
        return cls("regex", _text(pattern, "the regular expression"))

    @classmethod
    def choice(cls, choices: Any) -> Self:
        """One of some texts.

        Raises:
            HerdError: they are no list of texts, none, one of them empty, or too many.
        """
        if not isinstance(choices, list) or not choices or not all(isinstance(text, str) and text for text in choices):
            raise HerdError(f"the choices are {shown(choices)}, a list of texts is needed")
        if len(choices) > MOST_CHOICES:
            raise HerdError(f"there are {len(choices)} choices, at most {MOST_CHOICES} are taken")
        alternatives = " | ".join(json.dumps(require_unicode(text), ensure_ascii=False) for text in choices)
        return cls("lark", _text(f"start: CHOICE\nCHOICE: {alternatives}", "the choices"))

    @classmethod
    def lark(cls, grammar: Any) -> Self:
        """What a grammar in the Lark syntax of llguidance derives from ``start``.

        Raises:
            HerdError: it is no text, or too long.
        """
        return cls("lark", _text(grammar, "the grammar"))

    @classmethod
    def tools(cls, tools: Sequence[Any], choice: ToolChoice, parallel: bool, formats: Sequence[Format]) -> Self:
        """Calls of tools, whose names and arguments are always valid.

        Args:
            tools: in OpenAI's form.
            choice: ``auto`` for text or calls, ``required`` for calls, or the name of the one tool to call.
            parallel: whether there may be several.
            formats: how calls may be written under ``auto``, where the model decides; all others are written in the
                first.

        Raises:
            HerdError: a tool is wrong, or ``choice`` names none of them.
        """
        return cls._of_tools(call_grammar(checked_tools(tools), choice, parallel, formats), formats)

    @classmethod
    def calls(cls, tools: Sequence[Any], parallel: bool, formats: Sequence[Format]) -> Self:
        """Calls from the first token on, in any of the formats.

        Raises:
            HerdError: a tool is wrong.
        """
        return cls._of_tools(calls_alone_grammar(checked_tools(tools), parallel, formats), formats)

    @classmethod
    def no_calls(cls, tools: Sequence[Any], formats: Sequence[Format]) -> Self:
        """Any text that does not begin with a call.

        Raises:
            HerdError: a tool is wrong.
        """
        return cls._of_tools(no_calls_grammar(checked_tools(tools), formats), formats)

    @classmethod
    def _of_tools(cls, grammar: str, formats: Sequence[Format]) -> Self:
        require_size(grammar, "the list of tools", len(formats) * MOST_BYTES)
        return cls("tools", grammar)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise HerdError(f"{where} is {shown(value)}, a text is needed")
    require_size(require_unicode(value), where)
    return value
