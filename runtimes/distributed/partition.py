"""A partition of a rank's graph that is ready to run, and calls that run the same steps again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..bundle.shards import PartitionEntry

Step = Callable[[], None]


@dataclass(frozen=True)
class Partition:
    """A part of the graph between two collectives, ready to run.

    Attributes:
        session: runs it.
        inputs: names, in order.
        outputs: names, in order.
        entry: what the manifest says: hidden states [B, T, D] that come from the stage before it, collectives after it.
    """

    session: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    entry: PartitionEntry

    @classmethod
    def of(cls, session: Any, entry: PartitionEntry) -> Partition:
        """A session with its entry."""
        items = session.get_inputs(), session.get_outputs()
        inputs, outputs = (tuple(item.name for item in side) for side in items)
        return cls(session, inputs, outputs, entry)

    @property
    def given(self) -> list[str]:
        """Names of what it receives, computes or exchanges."""
        received = (exchange.value for exchange in self.entry.before)
        results = (exchange.result for exchange in self.entry.after if exchange.result)
        return [*received, *self.outputs, *results]

    @property
    def between(self) -> list[str]:
        """Names of what is given, but for caches and logits, which belong to a sequence."""
        return [name for name in self.given if name != "logits" and not name.startswith("present.")]


class CapturedCall:
    """Record and replay: the first call runs and records steps, later calls run the same steps on the same memory.

    Args:
        steps: makes a step after the one before has run.

    Attributes:
        recorded: the steps, once they have run.
    """

    def __init__(self, steps: Iterator[Step]) -> None:
        self._unrecorded, self.recorded = steps, list[Step]()

    def __call__(self) -> None:
        """Run every step."""
        for step in self.recorded:
            step()
        for step in self._unrecorded:
            step()
            self.recorded.append(step)


def run_once(steps: Iterable[Step]) -> None:
    """Run steps that are not needed again."""
    for step in steps:
        step()
