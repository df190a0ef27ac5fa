"""Whether cache blocks are left for what a call computes, and which can be taken back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..executors.runner import Runner
from ..kv_cache.paged import CachePools
from ..kv_cache.pool import BLOCK_TOKENS
from ..kv_cache.prefix_cache import PrefixCache
from ..kv_cache.sequence import Sequence


@dataclass(frozen=True)
class CacheRoom:
    """The memory of keys and values of an engine.

    Attributes:
        pools: where blocks are; None for an executor whose sequences have buffers of their own, which grow as needed.
        prefixes: blocks of earlier prompts and answers.
    """

    pools: CachePools | None
    prefixes: PrefixCache | None

    @classmethod
    def of(cls, runner: Runner) -> CacheRoom:
        """The memory that a runner works on."""
        return cls(runner.pools, PrefixCache.of(runner.pools) if runner.pools else None)

    @property
    def most_tokens(self) -> int | None:
        """Tokens of the longest sequence that there is memory for, None for as many as one wants."""
        return None if self.pools is None else self.pools.most_tokens()

    @property
    def used_share(self) -> float:
        """Of the memory, what sequences hold; blocks that are only kept for later count as free."""
        if self.pools is None:
            return 0.0
        kept = self.prefixes.evictable_bytes() if self.prefixes else 0
        return (self.pools.budget.used - kept) / max(1, self.pools.budget.most)

    def config(self) -> dict[str, str]:
        """Sizes under the names of vLLM's ``CacheConfig``; blocks are those of the longest sequence."""
        if self.pools is None:
            return {}
        tokens = self.pools.most_tokens()
        return {
            "block_size": str(BLOCK_TOKENS), "num_gpu_blocks": str(tokens // BLOCK_TOKENS),
            "kv_cache_size_tokens": str(tokens), "kv_cache_memory_bytes": str(self.pools.budget.most),
            "enable_prefix_caching": str(self.prefixes is not None)}

    def blocks(self, tokens: int) -> int:
        """Full blocks of so many tokens."""
        return tokens // BLOCK_TOKENS

    def has(self, sequence: Sequence, tokens: int, *, spare: int) -> bool:
        """Whether a sequence could grow by so many tokens, and ``spare`` others by a block each."""
        if self.pools is None:
            return True
        budget, pools = self.pools.budget, self.pools
        each = pools.whole.cost + pools.chunked.cost
        needed = spare * each + -(-tokens // BLOCK_TOKENS) * pools.whole.cost
        of_chunk = min(tokens, pools.chunk) if pools.chunk else 0
        needed += -(-of_chunk // BLOCK_TOKENS) * pools.chunked.cost
        if budget.used + needed <= budget.most:
            return True
        kept = self.prefixes.evictable_bytes() if self.prefixes else 0
        return budget.used - kept + needed <= budget.most

    def make(self, growing: Iterable[tuple[Sequence | None, int]]) -> bool:
        """Make room for a call; False where it is not to be had.

        Args:
            growing: sequences, and by how many tokens each grows.
        """
        if self.pools is None:
            return True
        budget = self.pools.budget
        needed = sum(max(0, sequence.cache.missing(len(sequence), len(sequence) + tokens))
                     for sequence, tokens in growing if sequence is not None)
        if budget.used + needed > budget.most and self.prefixes is not None:
            self.prefixes.evict(needed)
        return budget.used + needed <= budget.most
