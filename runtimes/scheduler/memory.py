"""Whether cache blocks are left for what a call computes, and which can be taken back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..executors.runner import Runner
from ..kv_cache.paged import Bytes, CachePools, together
from ..kv_cache.pool import BLOCK_TOKENS, CacheBudget
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
        pools = runner.pools
        return cls(pools, None if pools is None else PrefixCache.of(pools))

    @property
    def most_tokens(self) -> int | None:
        """Tokens of the longest sequence that there is memory for, None for as many as one wants."""
        return None if self.pools is None else self.pools.most_tokens()

    @property
    def used_share(self) -> float:
        """Of the memory, what sequences hold; blocks that are only kept for later count as free."""
        if self.pools is None:
            return 0.0
        return max(((budget.used - self._kept(budget)) / max(1, budget.most) for budget in self.pools.budgets),
                   default=0.0)

    def _kept(self, budget: CacheBudget) -> int:
        return self.prefixes.evictable_bytes(budget) if self.prefixes else 0

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return BLOCK_TOKENS if self.pools is None else self.pools.block_tokens

    def config(self) -> dict[str, str]:
        """Sizes under the names of vLLM's ``CacheConfig``; blocks are those of the longest sequence."""
        if self.pools is None:
            return {}
        tokens = self.pools.most_tokens()
        return {
            "block_size": str(self.block_tokens), "num_gpu_blocks": str(tokens // self.block_tokens),
            "kv_cache_size_tokens": str(tokens),
            "kv_cache_memory_bytes": str(sum(budget.most for budget in self.pools.budgets)),
            "enable_prefix_caching": str(self.prefixes is not None)}

    def blocks(self, tokens: int) -> int:
        """Full blocks of so many tokens."""
        return tokens // self.block_tokens

    def has(self, sequence: Sequence, tokens: int, *, spare: int) -> bool:
        """Whether a sequence could grow by so many tokens, and ``spare`` others by a block each."""
        if self.pools is None:
            return True
        needed = self._needed(self.pools, tokens, spare)
        return all(budget.has(count) or budget.has(count - self._kept(budget)) for budget, count in needed.items())

    def _needed(self, pools: CachePools, tokens: int, spare: int) -> Bytes:
        of_chunk = min(tokens, pools.chunk) if pools.chunk else 0
        return together({pool.budget: pool.cost * (spare + -(-count // self.block_tokens))}
                        for pool, count in ((pools.whole, tokens), (pools.chunked, of_chunk)) if pool.capacity)

    def make(self, growing: Iterable[tuple[Sequence | None, int]]) -> bool:
        """Make room for a call; False where it is not to be had.

        Args:
            growing: sequences, and by how many tokens each grows.
        """
        if self.pools is None:
            return True
        needed = together(sequence.cache.missing(len(sequence), len(sequence) + tokens)
                          for sequence, tokens in growing if sequence is not None)
        if self.prefixes is not None:
            self.prefixes.evict(needed)
        return all(budget.has(count) for budget, count in needed.items())
