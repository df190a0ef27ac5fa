"""The decoder of a sharded bundle: rank 0 runs its own part and tells the others what to run.

Every call is one command to all ranks, then rank 0's own part of it; the exchanges inside keep the ranks in step. In a
pipeline the logits come back from the last stage, and rank 0 goes on meanwhile: prompts run in prefill chunks, large
batches in as many parts as there are stages, and each stage works on another one. At most ``stages - 1`` of them are
beyond rank 0 whose logits it has not taken, so nobody can wait in a circle, whatever the transport can hold.

When a rank fails the engine is closed: what the ranks remember is no longer the same everywhere.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from typing import NoReturn

import numpy as np

from ...errors import HerdError
from ..bundle.manifest import Bundle
from ..executors.runner import Logits, Runner
from .collectives import Collectives
from .commands import Kind, Message, broadcast_message
from .processes import Processes, abandon
from .stage import Stage

PART = 4
"""Fewest sequences of a batch in one part: every part reads the weights again, so small ones are not worth it."""
GRACE = 5.0
"""Seconds that ranks have to end by themselves."""


class ShardedRunner(Runner):
    """All ranks behind the interface of one.

    Args:
        shard: rank 0's part.
        stage: its exchanges with the other ranks.
        bundle: of all of them.
        processes: the other ranks when rank 0 has started them, otherwise None.

    Attributes:
        stages: of the pipeline.
    """

    def __init__(self, shard: Runner, stage: Stage, bundle: Bundle, processes: Processes | None) -> None:
        self._shard, self.config = shard, bundle.manifest.config
        self.takes_features = shard.takes_features
        self._stage, self.stages = stage, stage.plan.pipeline
        self._awaited: deque[Logits] = deque()
        stage.before_send = lambda: self.collect(self.stages - 2)
        self._lock = threading.Lock()
        self.processes = processes
        if processes:
            weakref.finalize(self, processes.stop, 0.0)

    @property
    def link(self) -> Collectives:
        """Rank 0's exchanges, which count what they cost."""
        return self._stage.link

    def chunk_len(self, past: int) -> int:
        """A rank's: it has a part of the heads and memory of its own, so chunks may be longer than in one process."""
        return self._shard.chunk_len(past)

    # -- logits that are on their way ------------------------------------------------------------------------------

    def tell(self, message: Message) -> None:
        """Give the others a command."""
        broadcast_message(self.link, message)

    def awaited(self, logits: Logits) -> Logits:
        """Logits of a call that rank 0 has run its part of: these, or a place where the last stage's will be."""
        if self.stages > 1:
            logits = np.empty_like(logits)
            self._awaited.append(logits)
        return logits

    def collect(self, left: int) -> None:
        """Take logits that come back, the oldest first, until so many are left."""
        while len(self._awaited) > left:
            self._stage.collect(self._awaited.popleft())

    def parts(self, sequences: int) -> list[slice]:
        """Parts of a batch on which stages work at the same time."""
        count = max(1, min(self.stages, sequences // PART))
        ends = [sequences * part // count for part in range(count + 1)]
        return [slice(*pair) for pair in itertools.pairwise(ends)]

    def joined(self, logits: Items[Logits]) -> Logits:
        """Logits of all parts, when all have come."""
        self.collect(0)
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    # -- the end ---------------------------------------------------------------------------------------------------

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call at a time; one that does not come to its end closes the engine."""
        with self._lock:
            self.require_open()
            try:
                yield
            except BaseException as error:
                self._break(error)

    def _break(self, error: BaseException) -> NoReturn:
        """Close after a failure, and say what is known of it."""
        reason = abandon(error, self.link, self.processes)
        herd = isinstance(error, HerdError)
        self.closed = "the engine was closed when " + (f"it failed ({reason})" if herd else "a call was interrupted")
        if not herd:
            raise error
        raise HerdError(f"{reason}; load the bundle again") from error

    def close(self) -> None:
        """End the other ranks."""
        with self._lock:
            if not self.closed:
                self.closed = "the engine was closed"
                try:
                    self.tell(Message(Kind.END))
                finally:
                    if self.processes:
                        self.processes.stop(GRACE)
                    self._shard.close()
                    self.link.close()
