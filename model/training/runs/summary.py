"""What a run is going to do, told before it does it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ....errors import HerdError
from ...data import Samples
from ..data import Encoder

LOOKED_AT = 32
"""Samples by which tokens are estimated."""


@dataclass(frozen=True)
class DataSummary:
    """Data in numbers.

    Attributes:
        samples: to train on.
        held_out: for the held-out loss.
        tokens: of the samples to train on, estimated, 0 when none of those looked at can be used.
        cut: share of the samples that are longer than a row, estimated.
    """

    samples: int
    held_out: int
    tokens: int
    cut: float

    def __str__(self) -> str:
        count = f"{self.samples} samples to train on, {self.held_out} held out"
        if not self.tokens:
            return f"{count}; of {LOOKED_AT} that were looked at none can be used"
        long = f"; {self.cut:.0%} of the samples are longer than a row and cut there" if self.cut else ""
        return f"{count}, about {self.tokens} tokens{long}"


def summarize(samples: Samples, held_out: Samples, encoder: Encoder) -> DataSummary:
    """Look at a few samples that are spread over all."""
    lengths = list(_lengths(samples, encoder))
    mean = sum(length for length, _ in lengths) / max(1, len(lengths))
    cut = sum(is_cut for _, is_cut in lengths) / max(1, len(lengths))
    return DataSummary(len(samples), len(held_out), round(mean * len(samples)), cut)


def _lengths(samples: Samples, encoder: Encoder) -> Iterator[tuple[int, bool]]:
    count = len(samples)
    for index in range(0, count, max(1, count // LOOKED_AT)):
        try:
            encoded = encoder(samples[index])
        except HerdError:  # the run will tell when it comes to it
            continue
        yield len(encoded), encoded.is_cut
