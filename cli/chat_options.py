"""The sampling options of a chat: ``/set`` lists and changes them, spelled as on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from ..errors import HerdError
from .chat_input import first_word
from .options import checked_sampling

if TYPE_CHECKING:
    from ..model.processing.generation_defaults import GenerationDefaults


class ChatOptions:
    """How answers are drawn.

    Args:
        options: the parameters of the command.
        given: values on the command line, by parameter.
    """

    def __init__(self, options: Iterable[click.Option], given: dict[str, Any]) -> None:
        self._by_spelling = {max(option.opts, key=len).lstrip("-"): option for option in options}
        self.given = given

    def set(self, spelling: str, text: str) -> str:
        """Change an option, back to its default without a text; returns its name.

        Raises:
            HerdError: there is no such option, or no such value.
        """
        name = spelling.strip("-").replace("_", "-")
        if name not in self._by_spelling:
            raise HerdError(f"there is no option {spelling}: {', '.join(self._by_spelling)} can be set")
        option = self._by_spelling[name]
        self.given = checked_sampling({**self.given, str(option.name): _value(name, option, text)})
        return name

    def rows(self, recommended: GenerationDefaults | None) -> Mapping[str, str]:
        """What each option is now, by name; of those not set, what the checkpoint recommends, None for a server's."""
        return {name: self._shown(option, recommended) for name, option in self._by_spelling.items()}

    def _shown(self, option: click.Option, recommended: GenerationDefaults | None) -> str:
        key = str(option.name)
        if key in self.given:
            value = self.given[key]
            return ", ".join(map(repr, value)) if option.multiple else f"{value}"
        if recommended is None and "checkpoint" in str(option.show_default):
            return "the server's own"
        if hasattr(recommended, key):
            value = getattr(recommended, key)
            fallback = "greedy" if key == "temperature" else "not used"
            return fallback if value is None else f"{value}, as the checkpoint recommends"
        return str(option.show_default or "none")


def _value(name: str, option: click.Option, text: str) -> Any:
    """A value as the command line would take it; without a text the default."""
    if not text:
        return option.default if isinstance(option.default, int) else None
    try:
        value = option.type.convert(first_word(text)[0], option, None)
    except click.BadParameter as error:
        raise HerdError(f"{name} cannot be {text!r}: {error.message}") from error
    return (value,) if option.multiple else value
