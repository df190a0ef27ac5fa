"""What calls of the model cost, as measured: the scheduler divides its time by it, and speculation decides by it."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise

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
    """Seconds that tokens of prompts add to a call over answers, by how many they are: running means by size.

    A few tokens cost far more each than many do: every one of them wakes other experts, whose weights are read, until
    all are awake. So sizes are learned one by one, four from a number to its double, and lines lead from one to the
    next. A size never counts for more per token than a smaller one: one slow call would keep it from being tried again.
    """

    def __init__(self) -> None:
        self._means: dict[int, tuple[float, float]] = {}

    def record(self, tokens: int, seconds: float) -> None:
        """Note how much longer a call took for so many tokens of prompts."""
        seconds, size = max(0.0, seconds), int(4 * math.log2(tokens))
        known = self._means.get(size, (tokens, seconds))
        self._means[size] = (known[0] + _NEWS * (tokens - known[0]), known[1] + _NEWS * (seconds - known[1]))

    def of(self, tokens: int) -> float:
        """Seconds that so many tokens add; 0 as long as nothing was measured."""
        points = self._points()
        for (first, less), (last, more) in pairwise(points):
            if tokens <= last:
                return less + (more - less) * (tokens - first) / (last - first)
        return points[-1][1] * tokens / max(1.0, points[-1][0])

    def _points(self) -> list[tuple[float, float]]:
        """Tokens and seconds, from nothing on."""
        points, each = [(0.0, 0.0)], math.inf
        for size in sorted(self._means):
            tokens, seconds = self._means[size]
            each = min(each, seconds / tokens)
            points.append((tokens, each * tokens))
        return points

    def most(self, seconds: float, least: int, most: int) -> int:
        """The most tokens between two numbers that add no more than some seconds; ``least`` where all add more."""
        return max(least, bisect_right(range(most + 1), seconds, key=self.of) - 1)
