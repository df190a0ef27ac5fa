"""Options that commands of several packages share, each with one name and one meaning.

==================  ============================================================================
``--context``       tokens of a sequence: 4096, 128k or 1m
``--batch``         sequences that are decoded together; the most that a plan serves is ``--max-batch``
``--kv``            how keys and values are stored: ``float`` is what the target computes in
``--recipe``        precision of the weights
==================  ============================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


class Integer(click.IntRange):
    """A whole number within bounds; click calls it an integer range where it is none."""

    name = "integer"


class Number(click.FloatRange):
    """A number within bounds; click calls it a float range where it is none."""

    name = "number"


COUNT = Integer(min=1)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


class TokenCount(click.ParamType):  # type: ignore[type-arg]  # older releases of click have no ParamType[int]
    """A number of tokens: 4096, 128k or 1m; k is 1024, m is 1024k.

    Args:
        least: that is accepted.
    """

    name = "tokens"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; wrong usage when it is none, or too small."""
        match = re.fullmatch(r"(\d{1,12})([km]?)", str(value).strip(), re.IGNORECASE | re.ASCII)
        if not match:
            self.fail(f"{value!r} is no number of tokens such as 4096, 128k or 1m.", param, ctx)
        count = int(match[1]) * _UNITS[match[2].lower()]
        if count < self.least:
            self.fail(f"{count} is fewer than {self.least}.", param, ctx)
        return count


def context_option(what: str, **settings: Any) -> Decorator:
    """``--context``, the length of a sequence; settings are those of ``click.option``."""
    return click.option("--context", type=settings.pop("type", TokenCount()), **settings,
                        help=f"{what}, such as 4096, 128k or 1m.")


def batch_option(what: str, *, most: int | None = None) -> Decorator:
    """``--batch``, the number of sequences that are decoded together."""
    return click.option("--batch", type=click.IntRange(1, most), default=1, show_default=True,
                        help=f"Sequences decoded together, {what}.")


def kv_option(what: str) -> Decorator:
    """``--kv``, how keys and values are stored."""
    return click.option("--kv", type=click.Choice(("float", "int8", "fp8")), default="float", show_default=True,
                        help=f"Keys and values: {what}.")


def recipe_option(default: str | None, names: str, *, shown: str | bool = True) -> Decorator:
    """``--recipe``, the precision of the weights; ``shown`` says what the default is where it depends."""
    return click.option("--recipe", default=default, show_default=shown, help=f"Precision of the weights: {names}.")


def similar_options(name: str, known: Iterable[str]) -> list[str]:
    """Options that may be meant by one that does not exist.

    Those whose words begin with its words (``--tokens``: ``--max-new-tokens``), those that it abbreviates (``--lr``:
    ``--learning-rate``), or else those that are spelt nearly the same.
    """
    words = name.strip("-").replace("_", "-").split("-")
    options = {option: option.strip("-").split("-") for option in known}
    fitting = [option for option, parts in options.items()
               if all(any(part.startswith(word) for part in parts) for word in words)
               or "".join(part[0] for part in parts) == words[0]]
    return fitting or get_close_matches(name, options, n=2, cutoff=0.7)
