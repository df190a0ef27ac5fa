"""Tools as OpenAI's clients describe them, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ....errors import HerdError, shown
from ....model.processing.messages import require_unicode
from ..schema_checks import checked_schema, require_size

MOST_TOOLS = 128
"""Tools of one request, as many as OpenAI takes."""
LONGEST_NAME = 64
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: letters, digits, ``_``, ``.`` and ``-``.
        description: for the model.
        parameters: JSON schema of an object with its arguments.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})

    def described(self) -> dict[str, Any]:
        """In OpenAI's form."""
        return {"type": "function", "function": {
            "name": self.name, "description": self.description, "parameters": self.parameters}}


def checked_tools(tools: Any) -> list[Tool]:
    """Tools from a request, bare functions or wrapped ones; those that were checked before pass.

    Raises:
        HerdError: what is wrong, with the number of the tool.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)) or not tools:
        raise HerdError(f"the tools are {shown(tools)}, a list of functions is needed")
    if len(tools) > MOST_TOOLS:
        raise HerdError(f"there are {len(tools)} tools, at most {MOST_TOOLS} are taken: offer those that may be needed")
    checked = [tool if isinstance(tool, Tool) else _checked(f"tool {index}", tool) for index, tool in enumerate(tools)]
    names = [tool.name for tool in checked]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise HerdError(f"two tools are called {twice!r}: give each its own name")
    require_size(json.dumps([tool.described() for tool in checked]), "the list of tools")
    return checked


def require_name(name: Any, where: str) -> str:
    """The name of a tool.

    Raises:
        HerdError: it holds other characters, none, or more than 64.
    """
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not NAME_CHARACTERS.issuperset(name):
        raise HerdError(f"{where} is called {shown(name)}: a name has 1 to {LONGEST_NAME} letters, digits, '_', '.' "
                        "and '-'")
    return name


def _checked(where: str, tool: Any) -> Tool:
    function = _function(tool)
    if function is None:
        raise HerdError(f'{where} is {shown(tool)}, {{"type": "function", "function": {{…}}}} is needed')
    name, description = require_name(function.get("name"), where), function.get("description") or ""
    if not isinstance(description, str):
        raise HerdError(f"{where} has {shown(description)} as description, a text is needed")
    parameters = function.get("parameters")
    if parameters is None:
        return Tool(name, require_unicode(description))
    schema = checked_schema(parameters, f"the parameters of {name}")
    if schema.setdefault("type", "object") != "object":
        raise HerdError(f"the parameters of {name} have type {shown(schema['type'])}: arguments are an object")
    return Tool(name, require_unicode(description), schema)


def _function(tool: Any) -> Mapping[str, Any] | None:
    """The description of a function, which chat completions wrap and responses do not."""
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        return None
    found = tool.get("function", tool if "name" in tool else None)
    return found if isinstance(found, Mapping) else None
