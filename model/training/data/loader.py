"""Batches without end, the same on every run, that go on where they stopped."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ....errors import HerdError
from ...data import Samples
from .encode import Encoded, Encoder
from .packing import Batch, Rows
from .stream import Unseen, order

logger = logging.getLogger(__name__)

State = dict[str, Any]

NAMED = 20
"""Skipped samples that are named one by one; further ones are counted."""


class Loader:
    """Packed batches of one data-parallel rank.

    All ranks have batches of equal shape and, with ``epochs=None``, as many as they want, so that none waits for
    another. A batch may hold the end of an epoch and the beginning of the next.

    Args:
        samples: all samples, the same on every rank.
        encoder: takes samples no longer than a row.
        rows: of a batch.
        seq_len: tokens of a row.
        pad_id: token behind the samples of a row.
        seed: of the shuffle.
        rank: of this data-parallel rank.
        world: number of data-parallel ranks.
        broken: stop at a sample that cannot be used, or skip it, which is counted and logged.
        epochs: end after so many, with a last batch that may be mostly padding; None never ends.
        shuffle: False reads in order.

    Attributes:
        counts: samples that were used, cut (part of the used ones) and skipped.
        skipped: messages of the first samples that were skipped.
    """

    def __init__(
        self, samples: Samples, encoder: Encoder, *, rows: int, seq_len: int, pad_id: int = 0, seed: int = 0,
        rank: int = 0, world: int = 1, broken: Literal["stop", "skip"] = "stop", epochs: int | None = None,
        shuffle: bool = True,
    ) -> None:
        if encoder.max_tokens > seq_len:
            raise HerdError(f"samples may have {encoder.max_tokens} tokens and rows only {seq_len}: make them equal")
        if rows < 1:
            raise HerdError(f"a batch has {rows} rows, at least 1 is needed: give rows=1 or more")
        if not len(samples):
            raise HerdError("there are no samples: is everything held out?")
        self._samples, self._encoder = samples, encoder
        self._shape, self._pad_id = (rows, seq_len), pad_id
        self._seed, self._shuffle, self._epochs = seed, shuffle, epochs
        self._rank, self._world, self._broken = rank, world, broken
        self._unseen, self._taken = Unseen(), 0
        self._waiting: Encoded | None = None
        self.counts: Counter[str] = Counter()
        self.skipped: list[str] = []

    @property
    def epoch(self) -> float:
        """Epochs that this rank has read."""
        return self._position() / len(self._samples)

    def __iter__(self) -> Iterator[Batch]:
        """Go on with the stream; a second iterator goes on where the first one stopped."""
        while True:
            rows = Rows(*self._shape)
            while (sample := self._peek()) is not None and rows.place(sample):
                self._waiting, self._taken = None, self._taken + 1
                self.counts.update({"used": 1, "cut": int(sample.is_cut)})
            if not rows:
                return
            yield rows.batch(self._pad_id)

    def state_dict(self) -> State:
        """Where this rank stands, as JSON types. A checkpoint keeps those of all ranks."""
        return {
            "leftover": list(self._unseen.leftover), "start": self._unseen.start, "taken": self._taken,
            "rank": self._rank, "world": self._world, "samples": len(self._samples), "seed": self._seed,
            "counts": dict(self.counts),
        }

    def load_state_dict(self, states: State | Sequence[State]) -> None:
        """Go on from a checkpoint.

        With as many ranks as before every rank goes on with the identical stream. With another number the unseen
        samples are dealt anew.

        Args:
            states: of all ranks; a rank's own is enough while the number of ranks is the same.

        Raises:
            HerdError: they are of other data, or some are missing.
        """
        found = {int(state["rank"]): state for state in ([states] if isinstance(states, Mapping) else states)}
        first = next(iter(found.values()))
        for name, own in (("samples", len(self._samples)), ("seed", self._seed)):
            if first[name] != own:
                raise HerdError(f"the checkpoint's data has {name} {first[name]}, this run's {own}: give the same data")
        unseen = Unseen(tuple(first["leftover"]), int(first["start"]))
        self._waiting, self.counts = None, Counter()
        if first["world"] == self._world and self._rank in found:
            self._unseen, self._taken = unseen, int(found[self._rank]["taken"])
            self.counts.update(found[self._rank]["counts"])
            return
        if sorted(found) != list(range(first["world"])):
            raise HerdError(f"the checkpoint is of {first['world']} ranks, states of ranks {sorted(found)} were given: "
                            "all are needed to go on with another number")
        self._unseen, self._taken = unseen.after([int(found[r]["taken"]) for r in range(first["world"])]), 0

    def _position(self) -> int:
        return self._unseen.position(self._taken * self._world + self._rank)

    def _peek(self) -> Encoded | None:
        """The next usable sample, which stays the next until it has found its place; None at the end."""
        failures = 0
        while self._waiting is None:
            epoch, place = divmod(self._position(), len(self._samples))
            if self._epochs is not None and epoch >= self._epochs:
                return None
            index = int(order(self._seed, epoch, len(self._samples))[place]) if self._shuffle else place
            try:
                self._waiting = self._encoder(self._samples[index])
            except HerdError as error:
                failures += 1
                self._skip(error, failures)
        return self._waiting

    def _skip(self, error: HerdError, failures: int) -> None:
        if self._broken == "stop":
            raise HerdError(f"{error}; correct it, or choose to skip broken samples") from error
        if failures >= len(self._samples):
            raise HerdError(f"none of the {failures} samples can be used, the last because: {error}") from error
        self._taken += 1
        self.counts["skipped"] += 1
        if len(self.skipped) < NAMED:
            self.skipped.append(str(error))
            further = "" if len(self.skipped) < NAMED else "; further ones are only counted"
            logger.warning("skipped a sample, %d so far: %s%s", self.counts["skipped"], error, further)
