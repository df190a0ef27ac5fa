"""Where the server meets its packages for tools (``tools/``) and grammars (``structured/``).

They are imported when they are first needed: llguidance and the vocabulary's tables cost seconds.
"""

from __future__ import annotations

import importlib
import threading
from functools import cached_property
from typing import Any, Protocol

from ...model.config import HerdConfig
from ...model.processing import PromptProcessor
from ..scheduler import Constraint
from .parts import Part

Tool = dict[str, Any]
"""A function as OpenAI describes it: name, description, parameters, perhaps strict."""
Spec = Any
"""A ``structured.GrammarSpec``."""


class Parser(Protocol):
    """Splits the text of one answer into text for people and calls."""

    def feed(self, text: str) -> list[Part]:
        """Parts that are certain now."""

    def finish(self) -> list[Part]:
        """What was held back."""


class Toolkit:
    """Tools and grammars for one model."""

    def __init__(self) -> None:
        self._processor: PromptProcessor | None = None
        self._config: HerdConfig | None = None
        self._format: str | None = None
        self._building = threading.Lock()

    def attach(self, processor: PromptProcessor, config: HerdConfig, format: str | None = None) -> None:  # noqa: A002
        """Say for which model, and the only format of its calls, if not that of its template is to come first."""
        self._processor, self._config, self._format = processor, config, format

    # -- tools ---------------------------------------------------------------------------------------------------

    @property
    def formats(self) -> tuple[str, ...]:
        """In which calls may be written, the one that prompts ask for first; only one where it was fixed."""
        assert self._processor, "attached before requests come"
        if self._format:
            return (self._format,)
        formats: tuple[str, ...] = _tools().call_formats(self._processor.template)
        return formats

    def prepare_messages(self, messages: list[Any], tools: list[Tool]) -> tuple[list[Any], list[Tool]]:
        """Messages and tools in the form that the model's template takes."""
        assert self._processor, "attached before requests come"
        prepared: tuple[list[Any], list[Tool]] = _tools().prepare_messages(
            messages, tools, self._processor.template, self._format)
        return prepared

    def parser(self, tools: list[Tool], *, leading: bool = False) -> Parser:
        """A parser for one answer; calls are found at its beginning alone where the rest is of a form."""
        kind = _tools().LeadingCallParser if leading else _tools().ToolParser
        parser: Parser = kind(tools, self.formats)
        return parser

    # -- grammars ------------------------------------------------------------------------------------------------

    def spec(self, kind: str, *arguments: Any, **options: Any) -> Spec:
        """A grammar by the name of its constructor: ``json_object``, ``json_schema``, ``regex``, ``tools``, ..."""
        return getattr(importlib.import_module(".structured", __package__).GrammarSpec, kind)(*arguments, **options)

    def compile(self, spec: Spec) -> Constraint:
        """A constraint for one request; takes milliseconds, the first one seconds: call it on a thread.

        Raises:
            HerdError: the grammar is wrong, or says what cannot be enforced.
        """
        with self._building:
            grammars = self._grammars
        constraint: Constraint = grammars.compile(spec)
        return constraint

    def compile_beside_calls(self, form: Spec, tools: list[Tool], *, parallel: bool) -> Constraint:
        """A constraint to a form, or to calls in its place.

        Raises:
            HerdError: the form or a tool is wrong, or says what cannot be enforced.
        """
        no_calls = self.spec("no_calls", tools, self.formats)
        calls = self.spec("calls", tools, parallel, self.formats)
        both: Constraint = importlib.import_module(".structured", __package__).FormOrCalls(
            *map(self.compile, (form, no_calls, calls)))
        return both

    @cached_property
    def _grammars(self) -> Any:
        assert self._processor, "attached before requests come"
        assert self._config
        tokenizer = self._processor.tokenizer
        structured = importlib.import_module(".structured", __package__)
        return structured.Grammars(tokenizer, self._config.text.vocab_size, tokenizer.stop_ids)


def _tools() -> Any:
    return importlib.import_module(".tools", __package__)
