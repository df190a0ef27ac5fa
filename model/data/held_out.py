"""Training and held-out samples, told apart by a hash of their names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ...errors import HerdError
from .heartbeat import Heartbeat
from .records import Record
from .sources import Samples


class Subset:
    """Some samples of a source."""

    def __init__(self, source: Samples, indices: Sequence[int]) -> None:
        self._source, self._indices = source, np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._indices[index])]

    def key(self, index: int) -> str:
        """See ``Samples``."""
        return self._source.key(int(self._indices[index]))


def hold_out(samples: Samples, fraction: float) -> tuple[Samples, Samples]:
    """Split into training and held-out samples by a hash of their keys.

    Which side a sample is on depends on its key alone: not on its place, the other samples or the machine. Equal
    samples of a ``.jsonl`` file have equal keys, so that none is on both sides.

    Args:
        samples: all of them.
        fraction: about how much to hold out, within 0 and 1.

    Raises:
        HerdError: the fraction is none, or nothing is left to train on.
    """
    if not 0 <= fraction <= 1:
        raise HerdError(f"held_out is {fraction}, it must be within 0 and 1")
    beat = Heartbeat(f"holding out {fraction:.1%} of the samples")
    held = np.zeros(len(samples), bool)
    for index in range(len(samples) if fraction else 0):
        held[index] = _unit_interval(samples.key(index)) < fraction
        beat.tick(index, len(samples))
    if held.all():
        raise HerdError(f"all {len(samples)} samples are held out, none is left to train on: give more data, or less "
                        f"than held_out={fraction}")
    return Subset(samples, np.flatnonzero(~held).tolist()), Subset(samples, np.flatnonzero(held).tolist())


def _unit_interval(key: str) -> float:
    return float(int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:8], "big") / 2**64)
