"""One forward pass of a teacher for all students that learn from the same batches."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from ..data.packing import Batch
from .targets import Targets
from .teachers import Teacher


class RecentTargets:
    """A teacher's targets for the newest batches.

    Args:
        batches: how many are kept: those of a step.
    """

    def __init__(self, batches: int = 1) -> None:
        self._kept: deque[tuple[Batch, Targets]] = deque(maxlen=batches)

    def keep(self, batch: Batch, targets: Targets) -> None:
        """Remember the targets of a batch in place of the oldest ones."""
        self._kept.append((batch, targets))

    def of(self, batch: Batch) -> Targets | None:
        """The targets of an equal batch, None when there was none of late."""
        return next((targets for known, targets in self._kept if _is_same(known, batch)), None)


class SharedTeacher:
    """A teacher that answers the first who asks and repeats itself to all others.

    Args:
        teacher: computes what is not kept.
        recent: what is.
    """

    def __init__(self, teacher: Teacher, recent: RecentTargets) -> None:
        self._teacher, self._recent = teacher, recent

    def targets(self, batch: Batch) -> Targets:
        """See ``Teacher``."""
        if (found := self._recent.of(batch)) is None:
            found = self._teacher.targets(batch)
            self._recent.keep(batch, found)
        return found


def _is_same(one: Batch, other: Batch) -> bool:
    pairs = ((one.input_ids_BT, other.input_ids_BT), (one.document_BT, other.document_BT),
             (one.pixels_NCHW, other.pixels_NCHW))
    return all(_equal(a, b) for a, b in pairs)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
