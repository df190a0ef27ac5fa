"""What calls of the model cost, as measured: the scheduler divides its time by it, and speculation decides by it."""

from __future__ import annotations

_NEWS = 0.2
"""Weight of a new measurement against the mean of those before."""
_UNKNOWN_ROW = 0.25
"""What a row is thought to cost that was never measured, of what rows cost so far: little enough to be tried."""


class CallCost:
    """Seconds of a call by its rows, as measured; in between a line, and beyond it a part of what rows cost so far."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def record(self, rows: int, seconds: float) -> None:
        """Note what a call took."""
        known = self._seconds.setdefault(rows, seconds)
        self._seconds[rows] = known + _NEWS * (seconds - known)

    def of(self, rows: int) -> float:
        """Seconds of a call over so many rows; 0 as long as nothing was measured."""
        below = max((known for known in self._seconds if known <= rows), default=None)
        above = min((known for known in self._seconds if known >= rows), default=None)
        if below is None:
            return self._seconds[above] * rows / above if above else 0.0
        seconds = self._seconds[below]
        if above is None:
            return seconds * (1 + _UNKNOWN_ROW * (rows - below) / below)
        return seconds + (self._seconds[above] - seconds) * (rows - below) / max(1, above - below)


class PromptCost:
    """Seconds that a token of a prompt adds to a call, a running mean.

    Attributes:
        seconds: 0 as long as nothing was measured.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self, tokens: int, seconds: float) -> None:
        """Note how much longer a call took for so many tokens of prompts."""
        each = max(0.0, seconds) / tokens
        self.seconds = each if not self.seconds else self.seconds + _NEWS * (each - self.seconds)
