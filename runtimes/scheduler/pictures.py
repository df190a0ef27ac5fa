"""The pictures of one prompt: their features are computed some tiles at a time, between calls of the decoder."""

from __future__ import annotations

import numpy as np

from ...model.config import HerdConfig
from ...model.processing import PreparedPrompt
from ..executors.vision import VisionRunner
from ..kv_cache.prefix_cache import PrefixKeys
from ..kv_cache.sequence import Features, tile_digest


class Pictures:
    """Tiles of a prompt, and the features of those that were needed so far.

    Args:
        prompt: with its tiles.
        config: the model.
        salt: of the prompt's tenant.
        block_tokens: tokens of a cache block.
    """

    def __init__(self, prompt: PreparedPrompt, config: HerdConfig, salt: bytes, block_tokens: int) -> None:
        self._tiles, self._salt, self._block_tokens = prompt.pixel_values, salt, block_tokens
        self._token = config.image_token_id if config.vision else -1
        self._per_tile = config.vision.tokens_per_tile if config.vision else 1
        self._width = config.text.hidden_size
        self._digests = [] if self._tiles is None else [tile_digest(tile) for tile in self._tiles]
        # Places of image tokens, so that a span of the prompt is a span of features.
        self._places = np.flatnonzero(np.array(prompt.token_ids) == self._token) if self._digests else np.zeros(0, int)
        self._features: dict[int, Features] = {}

    def keys(self) -> PrefixKeys:
        """Keys of the blocks of the prompt, still without tokens."""
        return PrefixKeys(self._salt, self._token, self._per_tile, self._digests, self._block_tokens)

    def missing(self, first: int) -> int | None:
        """The first tile without features of those that the tokens from ``first`` on show, None without one."""
        begin = int(np.searchsorted(self._places, first)) // self._per_tile
        return next((tile for tile in range(begin, len(self._digests)) if tile not in self._features), None)

    def compute(self, vision: VisionRunner, first: int, tiles: int) -> None:
        """Compute the features of some of the tiles that are missing from token ``first`` on."""
        tile = self.missing(first)
        if tile is not None and self._tiles is not None:
            some = self._tiles[tile : tile + tiles]
            rows = np.split(vision.features(some), len(some))
            self._features |= {tile + index: row for index, row in enumerate(rows)}

    def end_of_known(self, first: int, end: int) -> int:
        """Where a piece of the prompt has to end because the features of the next tile are missing."""
        tile = self.missing(first)
        return end if tile is None else min(end, int(self._places[tile * self._per_tile]))

    def of(self, first: int, end: int) -> Features | None:
        """Features of the image tokens among tokens ``first`` to ``end`` - 1."""
        begin, last = (int(at) for at in np.searchsorted(self._places, [first, end]))
        if begin == last:
            return None
        tiles = range(begin // self._per_tile, -(-last // self._per_tile))
        rows = np.concatenate([self._features[tile] for tile in tiles])
        return rows[begin - tiles[0] * self._per_tile : last - tiles[0] * self._per_tile]
