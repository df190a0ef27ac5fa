"""Tools and grammars that need no grammar library, for tests of the server."""

from __future__ import annotations

import json
import re
from typing import Any

from herdgraph.errors import HerdError
from herdgraph.runtimes.server.parts import CallArguments, CallStart, Part, TextPart
from herdgraph.runtimes.server.toolkit import Toolkit


class FakeToolkit(Toolkit):
    """Remembers what was compiled; calls are written ``<name {"json": 1}>``."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled: list[Any] = []

    def prepare_messages(self, messages: list[Any], tools: list[Any]) -> tuple[list[Any], list[Any]]:
        """Tools as a system message, calls and results as texts."""
        named = ", ".join(tool["function"]["name"] for tool in tools)
        plain = [{"role": message["role"], "content": message["content"] or json.dumps(message["tool_calls"])}
                 for message in messages]
        return [{"role": "system", "content": f"tools: {named}"}, *plain], []

    def parser(self, tools: list[Any], *, leading: bool = False) -> FakeParser:
        return FakeParser()

    def spec(self, kind: str, *arguments: Any, **options: Any) -> Any:
        return (kind, arguments, options)

    def compile(self, spec: Any) -> Any:
        if spec[1] and spec[1][0] == "(":
            raise HerdError("the regular expression '(' is not closed")
        self.compiled.append(spec)
        return spec

    def compile_beside_calls(self, form: Any, tools: list[Any], *, parallel: bool) -> Any:
        self.compile(form)
        return ("beside_calls", (form, tools), {"parallel": parallel})


class FakeParser:
    """Finds calls when they are complete."""

    def __init__(self) -> None:
        self._held, self._calls = "", 0

    def feed(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        while match := re.search(r"<(\w+) (\{.*?\})>", self._held):
            if before := self._held[: match.start()]:
                parts.append(TextPart(before))
            half = len(match[2]) // 2
            parts += [CallStart(self._calls, f"call_{self._calls}", match[1]),
                      CallArguments(self._calls, match[2][:half]), CallArguments(self._calls, match[2][half:])]
            self._calls, self._held = self._calls + 1, self._held[match.end():]
        if "<" not in self._held and self._held:
            parts.append(TextPart(self._held))
            self._held = ""
        return parts

    def finish(self) -> list[Part]:
        held, self._held = self._held, ""
        return [TextPart(held)] if held else []
