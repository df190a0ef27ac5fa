"""Rank 0 where keys and values lie in cache blocks: it decides which block is whose, for all ranks.

All ranks have blocks of the same numbers (``CachePools.of``). Every command says in block tables where the past of its
sequences is and where their tokens go, so whatever happens to tables in between, forks, truncation, prefixes that are
taken over from other sequences, is rank 0's own business. Only a block that is copied has to be copied everywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from functools import partial

from ..bundle.manifest import Bundle
from ..executors.blocks import BlockRunner, PlacedStep
from ..executors.runner import Logits, Row, Step
from ..kv_cache.sequence import Features, Sequence
from .commands import StepCommand
from .front_end import ShardedRunner
from .processes import Processes
from .stage import Stage


class PagedShards(ShardedRunner, BlockRunner):
    """See the module.

    Args:
        shard: rank 0's part.
        stage: its exchanges with the other ranks.
        bundle: of all of them.
        processes: the other ranks when rank 0 has started them, otherwise None.
    """

    def __init__(self, shard: BlockRunner, stage: Stage, bundle: Bundle, processes: Processes | None) -> None:
        super().__init__(shard, stage, bundle, processes)
        self.shard, self.pools = shard, shard.pools
        self._copies = deque[tuple[int, int, int]]()
        for of_chunked, pool in enumerate((shard.pools.whole, shard.pools.chunked)):
            pool.copied = partial(self._note_copy, of_chunked)

    def _note_copy(self, of_chunked: int, block: int, twin: int) -> None:
        self._copies.append((of_chunked, block, twin))

    def first_calls(self, sequences: int) -> Iterator[list[Step]]:
        """See ``BlockRunner``: rank 0's, which are those of all."""
        return self.shard.first_calls(sequences)

    def step(self, steps: Items[Step]) -> Logits:
        """Append tokens to several sequences; see ``BlockRunner``."""
        placed = self.shard.place_steps(steps)  # where there is no room, the call is refused and nothing has happened
        with self.call():
            logits = self.joined([self.compute(placed[part]) for part in self.parts(len(placed))])
        for step in steps:
            step.sequence.append(map(int, step.token_ids))
        return logits

    def rows(self, steps: Items[Step]) -> list[Row]:
        """Append tokens to several sequences; see ``Runner``. In a pipeline it is logits that come back."""
        if self.stages > 1:
            return list(self.step(steps))
        placed = self.shard.place_steps(steps)
        with self.call():
            self._command(placed)
            found = self.shard.answers(placed)
        for step in steps:
            step.sequence.append(map(int, step.token_ids))
        return found

    def prefill_chunk(self, sequence: Sequence, token_ids: list[int], features: Features, rows: Features) -> Logits:
        """Compute a prefill chunk; see ``Runner``. In a pipeline the logits are there after ``settle``."""
        placed = self.shard.place_steps([Step(sequence, token_ids, rows.tolist(), features)])
        with self.call():
            logits = self.compute(placed)
            return logits.copy() if len(token_ids) == 1 and self.stages == 1 else logits

    def settle(self) -> None:
        """Wait for logits that are on their way."""
        with self.call():
            self.collect(0)

    def compute(self, steps: Items[PlacedStep]) -> Logits:
        """On all ranks. In a pipeline the logits are on their way; see ``BlockRunner``."""
        self._command(steps)
        return self.awaited(self.shard.compute(steps))

    def _command(self, steps: Items[PlacedStep]) -> None:
        """Let the other ranks do their part of a call."""
        copies = [self._copies.popleft() for _ in range(len(self._copies))]
        self.tell(StepCommand(steps, copies).message())
