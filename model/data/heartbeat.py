"""A sign of life of what takes long and says nothing else."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

SECONDS = 5.0
"""Between two signs."""


class Heartbeat:
    """Logs every few seconds how far something is; what ends before says nothing.

    Args:
        what: is being done.
    """

    def __init__(self, what: str) -> None:
        self._what, self._last = what, time.monotonic()

    def tick(self, done: int, total: int | None = None) -> None:
        """Say how far it is, if it is time.

        Args:
            done: how many of what is counted.
            total: of how many, None when that is not known.
        """
        if (now := time.monotonic()) - self._last >= SECONDS:
            self._last = now
            logger.info("%s: %d%s", self._what, done, "" if total is None else f" of {total}")
