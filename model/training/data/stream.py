"""Who reads which sample next: an endless stream, dealt to the ranks like cards, that survives a change of players.

Position p of the stream is sample ``order(p // n)[p % n]`` of n: every epoch is a permutation of its own, drawn from
seed and epoch. Rank r of W takes every W-th unseen position, beginning with the r-th. Ranks advance at their own pace,
because samples have different lengths, so after an interruption what is unseen is a few left-over positions and
everything from some position on. These are dealt anew, to as many ranks as there are then: nothing is lost and nothing
comes twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Unseen:
    """The positions of the stream that nobody has read.

    Attributes:
        leftover: positions before ``start``, in order.
        start: from here on all are unseen.
    """

    leftover: tuple[int, ...] = ()
    start: int = 0

    def position(self, place: int) -> int:
        """The unseen position with that many unseen ones before it."""
        kept = len(self.leftover)
        return self.leftover[place] if place < kept else self.start + place - kept

    def after(self, taken: Sequence[int]) -> Unseen:
        """What is unseen once rank r of ``len(taken)`` has taken ``taken[r]`` positions."""
        world = len(taken)
        first, last = min(taken) * world, max(taken) * world  # all before the first are seen, none from the last on
        rest = [self.position(place) for place in range(first, last) if place // world >= taken[place % world]]
        return Unseen((*rest, *self.leftover[last:]), self.start + max(0, last - len(self.leftover)))


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The permutation of an epoch, the same on every machine."""
    return np.random.default_rng([seed, epoch]).permutation(count)
