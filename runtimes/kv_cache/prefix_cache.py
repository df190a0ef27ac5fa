"""Automatic prefix caching: blocks of keys and values that any later prompt with the same beginning takes over.

Every full block has a key, a hash over the block before it, its own tokens, the pictures that its image tokens show and
the tenant's salt. So equal keys mean equal pasts, and a chain of known keys is a prefix that need not be computed:

    key_i = SHA-256(key_{i-1} | tokens_i | pictures_i),   key_{-1} = SHA-256(salt)

Layers that see their whole past need all blocks of a prefix of h tokens. Chunked layers need those of its last, begun
attention chunk alone, [floor(h / C) C, h). So the blocks of chunked layers are the first that may go, chunk by chunk;
what is left is a prefix that ends at a multiple of C. The cache refers to its blocks like a sequence does; blocks that
nobody else refers to are given back when memory is needed, the least recently used first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from .paged import Bytes, CachePools, PagedCache
from .pool import BLOCK_TOKENS, BlockPool, CacheBudget


class PrefixKeys:
    """The keys of the full blocks of one token list, which grows.

    Args:
        salt: prefixes are shared only where it is equal.
        image_token: id of the tokens that stand for parts of tiles.
        tile_tokens: image tokens of a tile.
        tiles: content hashes of the tiles.
        block_tokens: tokens of a block.
    """

    def __init__(
        self, salt: bytes, image_token: int = -1, tile_tokens: int = 1, tiles: Items[bytes] = (),
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self._block_tokens = block_tokens
        self._parent = hashlib.sha256(salt).digest()
        self._image_token, self._tile_tokens, self._tiles = image_token, tile_tokens, tiles
        self._images = 0
        self.keys: list[bytes] = []

    def extend(self, token_ids: Items[int]) -> None:
        """Go on to the end of the last full block of the whole list."""
        tokens = self._block_tokens
        for first in range(len(self.keys) * tokens, len(token_ids) // tokens * tokens, tokens):
            block = token_ids[first : first + tokens]
            digest = hashlib.sha256(self._parent + np.array(block, "<i4").tobytes())
            for tile in self._shown(sum(token == self._image_token for token in block)):
                digest.update(tile)
            self._parent = digest.digest()
            self.keys.append(self._parent)

    def _shown(self, images: int) -> Items[bytes]:
        """Tiles of which so many further image tokens show a part."""
        first, last = self._images // self._tile_tokens, -(-(self._images + images) // self._tile_tokens)
        self._images += images
        return self._tiles[first:last] if images else ()


@dataclass(eq=False)
class _Entry:
    """A block of every kind of layers, None where there is none or none any more."""

    whole: int | None
    chunked: int | None
    chunk_is_full: bool = False


class PrefixCache:
    """The blocks of prefixes.

    Args:
        pools: where the blocks are.

    Attributes:
        queried_tokens: of all prompts that were looked up.
        found_tokens: of them, that were taken over.
    """

    def __init__(self, pools: CachePools) -> None:
        assert pools.chunk % pools.block_tokens == 0, "an attention chunk has whole blocks"
        self._pools, self._of_chunk = pools, pools.chunk // pools.block_tokens
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self.queried_tokens = self.found_tokens = 0

    @classmethod
    def of(cls, pools: CachePools) -> PrefixCache | None:
        """A cache, None where attention chunks are no whole blocks."""
        return cls(pools) if pools.chunk % pools.block_tokens == 0 else None

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, keys: Items[bytes], tokens: int) -> tuple[PagedCache, int]:
        """The longest prefix that is known.

        Args:
            keys: of the prompt's full blocks.
            tokens: of the prompt; one at least is left to be computed.

        Returns:
            A cache that begins with it, and its tokens.
        """
        known = self._known(keys, tokens)
        count = self._usable(known)
        cache, first = PagedCache(self._pools), self._first_of_chunk(count)
        cache.whole.adopt(entry.whole for entry in known[:count] if entry.whole is not None)
        cache.chunked.adopt(entry.chunked for entry in known[first:count] if entry.chunked is not None)
        self.touch(keys[:count])
        return cache, count * self._pools.block_tokens

    def blocks(self, keys: Items[bytes], tokens: int) -> int:
        """Blocks that ``take`` would take over."""
        return self._usable(self._known(keys, tokens))

    def count(self, queried: int, found: int) -> None:
        """Note that a prompt of so many tokens begins with so many that were taken over."""
        self.queried_tokens += queried
        self.found_tokens += found

    def publish(self, keys: Items[bytes], cache: PagedCache, first: int) -> None:
        """Let others use the blocks ``first`` and following, which are computed and lie in one attention chunk.

        Where a key is known already, its block stays the one that is shared.
        """
        begin = self._of_chunk and first % self._of_chunk
        for index in range(first, len(keys)):
            entry = self._entries.get(keys[index])
            if entry is None:
                whole = _shared(self._pools.whole, cache.whole.numbers, index)
                entry = self._entries[keys[index]] = _Entry(whole, None)
            if entry.chunked is None:
                entry.chunked = _shared(self._pools.chunked, cache.chunked.numbers, begin + index - first)
            self._mark_full_chunk(keys, index)

    def touch(self, keys: Items[bytes]) -> None:
        """Note that a prefix was used: its end goes before its beginning."""
        for key in reversed(keys):
            if key in self._entries:
                self._entries.move_to_end(key)

    def evictable_bytes(self, budget: CacheBudget) -> int:
        """Bytes of blocks that nobody else refers to, of those that count in a budget."""
        return sum(pool.cost for entry in list(self._entries.values()) for pool, block in self._blocks(entry)
                   if pool.budget is budget and not pool.is_shared(block))

    def evict(self, needed: Bytes) -> None:
        """Give back blocks until so many bytes are free, or none is left that nobody else refers to."""
        pools = self._pools
        chunked = pools.chunked.budget
        for entry in list(self._entries.values()):
            if chunked.has(needed.get(chunked, 0)):
                break
            if entry.chunk_is_full and entry.chunked is not None and not pools.chunked.is_shared(entry.chunked):
                pools.chunked.release([entry.chunked])
                entry.chunked = None
        for key, entry in list(self._entries.items()):
            if all(budget.has(count) for budget, count in needed.items()):
                return
            if not any(pool.is_shared(block) for pool, block in self._blocks(entry)):
                self._drop(key)

    def clear(self) -> None:
        """Forget everything."""
        for key in list(self._entries):
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        for pool, block in self._blocks(self._entries.pop(key)):
            pool.release([block])

    def _blocks(self, entry: _Entry) -> Iterator[tuple[BlockPool, int]]:
        for pool, block in ((self._pools.whole, entry.whole), (self._pools.chunked, entry.chunked)):
            if block is not None:
                yield pool, block

    def _known(self, keys: Items[bytes], tokens: int) -> list[_Entry]:
        """The entries of the first blocks of a prompt, of which a token at least is left over."""
        known: list[_Entry] = []
        for key in keys[: (tokens - 1) // self._pools.block_tokens]:
            if (entry := self._entries.get(key)) is None:
                break
            known.append(entry)
        return known

    def _usable(self, known: Items[_Entry]) -> int:
        """Blocks of the longest prefix for which every kind of layers has what it needs."""
        count = len(known)
        if not self._pools.chunk:
            return count
        first = self._first_of_chunk(count)
        held = next((at for at in range(first, count) if known[at].chunked is None), count)
        return held if held > first else first

    def _first_of_chunk(self, count: int) -> int:
        """The first block of the attention chunk in which a prefix of so many blocks ends."""
        of_chunk = self._of_chunk
        return count // of_chunk * of_chunk if of_chunk else count

    def _mark_full_chunk(self, keys: Items[bytes], index: int) -> None:
        """After the last block of an attention chunk, none of its chunked blocks is needed to go on."""
        of_chunk = self._of_chunk
        if of_chunk and (index + 1) % of_chunk == 0:
            for key in keys[index + 1 - of_chunk : index + 1]:
                if key in self._entries:
                    self._entries[key].chunk_is_full = True


def _shared(pool: BlockPool, numbers: np.ndarray, index: int) -> int | None:
    return pool.share(int(numbers[index])) if pool.capacity else None
