"""What rendering a chat template may cost: processor time, and bytes of everything that it makes.

A template comes with a checkpoint, so it is a stranger's program. ``sandbox`` compiles it so that every loop, call,
operator and text reports here; whoever spends too much is stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2.utils import Namespace

from ...errors import HerdError

SECONDS = 1.0
"""Processor time of a template, to which a second is added for each megabyte of messages."""
BYTES = 64 << 20
"""Bytes of all values that a template makes, to which ``_SHARE`` times the messages' are added."""
TEXT = 1 << 20
"""Characters of one text that a template makes, to which four times the messages' are added."""
NUMBER_BITS = 4096
"""Bits of a whole number: 1,234 digits."""

_SHARE = 256
_NODE = 128  # bytes that a value costs beside its text, about


class TemplateCostError(HerdError):
    """A chat template does more than any chat needs."""


class Budget:
    """What is left to one rendering.

    Args:
        given: bytes of the messages and tools, which a template may copy a number of times.
    """

    def __init__(self, given: int) -> None:
        self._ends = time.thread_time() + SECONDS + given / 1e6
        self._left = BYTES + _SHARE * given
        self._text = TEXT + 4 * given

    def spend(self, size: int) -> None:
        """Account for ``size`` bytes, and look at the clock.

        Raises:
            TemplateCostError: there is not as much left.
        """
        self._left -= size + _NODE
        if self._left < 0:
            raise TemplateCostError("it makes more text and lists than any chat needs")
        if time.thread_time() > self._ends:
            raise TemplateCostError("it takes longer than any chat needs")

    def spend_text(self, characters: int) -> None:
        """Account for a text before it is made.

        Raises:
            TemplateCostError: it is too long.
        """
        if characters > self._text:
            raise TemplateCostError(f"it makes a text of {characters} characters, at most {self._text} are allowed")
        self.spend(characters)

    def charged(self, value: Any) -> Any:
        """Account for a value that the template made, with all that it refers to; returns the value."""
        if isinstance(value, str):
            self.spend_text(len(value))
        elif isinstance(value, int):
            require_bits(value.bit_length())
        elif isinstance(value, Iterator):
            return map(self.charged, value)
        elif isinstance(value, (list, tuple, set, frozenset, Mapping, Namespace)):
            self.spend(self._deep_size(value))
        return value

    def spend_copies(self, value: Any, times: int) -> None:
        """Account for that many copies of a list before they are made.

        Raises:
            TemplateCostError: they are too large.
        """
        self.spend(self._deep_size(value) * times)

    def _deep_size(self, value: Any) -> int:
        """Lists that hold each other twice, thirty deep, are a few lines of a template and 2^30 values of a text."""
        size, waiting = 0, [value]
        while waiting and size <= self._left:
            item = waiting.pop()
            size += _NODE + (len(item) if isinstance(item, str) else 0)
            if (inside := _parts(item)) is not None:
                waiting.extend(inside)
        return size


def _parts(value: Any) -> Iterable[Any] | None:
    if isinstance(value, Namespace):
        attributes: dict[str, Any] = value._Namespace__attrs
        return attributes.values()
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    return value if isinstance(value, (list, tuple, set, frozenset)) else None


def require_bits(bits: float) -> None:
    """Whole numbers have no limit in Python.

    Raises:
        TemplateCostError: a number of that many bits is too large.
    """
    if bits > NUMBER_BITS:
        raise TemplateCostError(f"it makes a number of more than {NUMBER_BITS} bits")


_CURRENT: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def bounded(given: int = 0) -> Iterator[None]:
    """Everything inside, of this thread, shares a new budget."""
    token = _CURRENT.set(Budget(given))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def budget() -> Budget:
    """The budget that holds here."""
    return _CURRENT.get()


def charging(make: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose results are accounted for."""

    def charged(*args: Any, **options: Any) -> Any:
        return budget().charged(make(*args, **options))

    return charged
