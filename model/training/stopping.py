"""A run that is asked to end does so between two steps, when there is something whole to save."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notes the first signal that asks this process to end, inside of the context; a second one acts at once.

    Signals that the process ignores stay ignored, and outside of the main thread nothing is noted.

    Attributes:
        number: of the signal, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def act(self, number: int, note: str) -> None:
        """Let a signal do what it would have done at first.

        Args:
            number: of the signal, which another rank may have had.
            note: is added to what its handler raises.
        """
        self._restore()
        self.number = 0
        try:
            signal.raise_signal(number)
        except BaseException as error:
            error.add_note(note)
            raise

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in _SIGNALS}
            self._before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self.number and error is None:
            signal.raise_signal(self.number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._restore()
        self.number = number
        logger.info("asked to end: this step is finished and saved first; ask again to end at once")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
