"""Signals that ask a command to end unwind the stack, so that temporary files are removed on the way out."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

received: list[int] = []
"""Signals that asked this process to end."""


class Interrupted(BaseException):
    """A signal asked the process to end. No ``Exception``, so that nothing on the way out takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def signals_unwind() -> Iterator[None]:
    """Let signals raise ``Interrupted``; what the caller ignores stays ignored."""
    received.clear()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    for further in _SIGNALS:  # the way out is short, and a second signal must not cut it
        signal.signal(further, signal.SIG_IGN)
    received.append(number)
    raise Interrupted(number)
