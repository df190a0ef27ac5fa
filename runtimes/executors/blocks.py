"""Runners whose sequences share cache blocks: any tokens of any sequences in one call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import numpy as np

from ..kv_cache.paged import Bytes, CachePools, PagedCache, require, together
from ..kv_cache.sequence import Features, Sequence
from .runner import Logits, Row, Runner, Step

Array = np.ndarray[Any, Any]


class PlacedStep(NamedTuple):
    """What one sequence gets in a call, and the cache blocks where its past is and its tokens go.

    Attributes:
        token_ids: at least one.
        past: tokens before them.
        rows: places among them whose logits are wanted, in order.
        whole: blocks of layers that see the whole past, int32.
        chunked: blocks of chunked layers.
        features: one row per image token among them.
        greedy: see ``Step``.
        never: see ``Step``.
    """

    token_ids: Items[int]
    past: int
    rows: Items[int]
    whole: Array
    chunked: Array
    features: Features | None
    greedy: bool = False
    never: Items[int] = ()


class BlockRunner(Runner):
    """Keys and values lie in cache blocks; a call is told in block tables which belong to whom.

    Attributes:
        pools: the blocks.
    """

    pools: CachePools

    def new_cache(self) -> PagedCache:
        """See ``Runner``."""
        return PagedCache(self.pools)

    def make_room(self, sequence: Sequence, tokens: int) -> None:
        """Blocks are taken call by call; the pools' budget is what can be known beforehand."""
        whole = self.pools.whole
        blocks = -(-(len(sequence) + tokens) // whole.tokens) - len(sequence.cache.whole.numbers)
        whole.budget.require(whole.cost * max(0, blocks))

    def chunk_len(self, past: int) -> int:
        """The same after any past: operators hold scores of one cache block at a time."""
        return self.longest_chunk

    def take_blocks(self, steps: Items[Step]) -> None:
        """Let the tokens of a call be written.

        Raises:
            HerdError: the pools are full; no sequence has grown.
        """
        with self.pools.lock:
            require(together(_missing(step) for step in steps))
            for step in steps:
                step.sequence.make_room(len(step.token_ids))

    def place_steps(self, steps: Items[Step]) -> list[PlacedStep]:
        """Find cache blocks for the tokens of several sequences.

        Raises:
            HerdError: the pools are full; nothing has changed.
        """
        self.take_blocks(steps)
        return [PlacedStep(step.token_ids, len(step.sequence), step.rows, step.sequence.cache.whole.numbers,
                           step.sequence.cache.chunked.numbers, step.features, step.greedy, step.never)
                for step in steps]

    def first_calls(self, sequences: int) -> Iterator[list[Step]]:
        """Calls of up to so many sequences whose first time takes long; here there are none."""
        del sequences
        yield from ()

    def warm_up(self, sequences: int) -> None:
        """Run them; see ``Runner``."""
        for steps in self.first_calls(sequences):
            self.rows(steps)

    @abstractmethod
    def compute(self, steps: Items[PlacedStep]) -> Logits:
        """One call, whoever has found the blocks; no sequence grows. Returns what ``step`` does."""

    def answers(self, steps: Items[PlacedStep]) -> list[Row]:
        """The same, where logits are far away with the best tokens of greedy steps instead; see ``Runner.rows``."""
        return list(self.compute(steps))

    def rows(self, steps: Items[Step]) -> list[Row]:
        """Append tokens to several sequences in one call; see ``Runner``."""
        found = self.answers(self.place_steps(steps))
        for step in steps:
            step.sequence.append(map(int, step.token_ids))
        return found

    def step(self, steps: Items[Step]) -> Logits:
        """Append tokens to several sequences in one call.

        Args:
            steps: of different sequences.

        Returns:
            float32 [rows, vocabulary], the rows of all steps in order; valid until this thread's next call.

        Raises:
            HerdError: the pools are full; no sequence has grown.
        """
        logits = self.compute(self.place_steps(steps))
        for step in steps:
            step.sequence.append(map(int, step.token_ids))
        return logits

    def prefill_chunk(self, sequence: Sequence, token_ids: list[int], features: Features, rows: Features) -> Logits:
        """Compute a prefill chunk; see ``Runner``."""
        logits = self.compute(self.place_steps([Step(sequence, token_ids, rows.tolist(), features)]))
        return logits.copy() if len(token_ids) == 1 else logits  # memory of single tokens is used again

    def decode(self, sequence: Sequence, token_id: int) -> Logits:
        """Append one text token; see ``Runner``."""
        return self.step([Step(sequence, [token_id], [0])])[0]

    def decode_greedy(self, sequence: Sequence, token_id: int, never: Items[int] = ()) -> Row:
        """See ``Runner``."""
        return self.rows([Step(sequence, [token_id], [0], greedy=True, never=never)])[0]

    def decode_batch(self, sequences: Items[Sequence], token_ids: Items[int]) -> Logits:
        """Append one text token to each of several sequences; see ``Runner``."""
        return self.step([Step(sequence, [int(token)], [0])
                          for sequence, token in zip(sequences, token_ids, strict=True)])


def _missing(step: Step) -> Bytes:
    """Bytes of cache blocks that a step will take."""
    past = len(step.sequence)
    missing: Bytes = step.sequence.cache.missing(past, past + len(step.token_ids))
    return missing


def table_width(blocks: int) -> int:
    """Columns of a block table: a power of two, so that arrays are made anew rarely."""
    return 1 << max(0, blocks - 1).bit_length()
