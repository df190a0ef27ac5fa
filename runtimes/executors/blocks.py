"""Runners whose sequences share cache blocks: any tokens of any sequences in one call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence as Items

from ..kv_cache.paged import Bytes, CachePools, PagedCache, require, together
from ..kv_cache.sequence import Sequence
from .runner import Logits, Runner, Step


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

    @abstractmethod
    def step(self, steps: Items[Step]) -> Logits:
        """Append tokens to several sequences in one call; see ``Runner``."""

    def decode(self, sequence: Sequence, token_id: int) -> Logits:
        """Append one text token; see ``Runner``."""
        return self.step([Step(sequence, [token_id], [0])])[0]

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
