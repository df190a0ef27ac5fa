"""From image tiles to features, with an LRU cache of features.

A conversation shows the model the same pictures with every turn, and many people ask about one picture: features are
kept by the SHA-256 of a tile's pixels, and the least recently used are dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from ...errors import HerdError
from ...model.config import HerdConfig
from ..kv_cache.sequence import Features, tile_digest

TILES_PER_CALL = 4
"""Tiles in one call: enough to fill the matrix products, few enough to bound the memory of activations."""

IMAGE_CACHE_BYTES = 256 << 20
"""Most bytes of features in the cache."""

ImageGraph = Callable[[np.ndarray[Any, Any]], Features]
"""Runs tiles, float32 [N, 3, H, W], through the image tower in one call: features [N · tokens per tile, width]."""


class VisionRunner:
    """The image tower of a bundle, on whichever executor, behind an LRU cache of features.

    Args:
        run: the image tower.
        config: the model.

    Attributes:
        queried: tiles whose features were asked for.
        found: of them, those that were computed before.
    """

    def __init__(self, run: ImageGraph, config: HerdConfig) -> None:
        assert config.vision is not None, "a bundle with an image graph has an image configuration"
        self._run, self.config, self.width = run, config.vision, config.text.hidden_size
        self._cache: OrderedDict[bytes, Features] = OrderedDict()
        self.queried = self.found = 0

    def features(self, pixel_values: np.ndarray[Any, Any]) -> Features:
        """Tiles [N, 3, H, W], normalised float32, to features [N · tokens per tile, width].

        Raises:
            HerdError: another shape or type.
        """
        side, channels = self.config.image_size, self.config.num_channels
        wanted = f"float32 [tiles, {channels}, {side}, {side}]"
        if pixel_values.dtype != np.float32 or pixel_values.shape[1:] != (channels, side, side):
            raise HerdError(f"pixel_values is {pixel_values.dtype} {list(pixel_values.shape)}, {wanted} is needed")
        if not len(pixel_values):
            return np.zeros((0, self.width), np.float32)
        digests = [tile_digest(tile) for tile in pixel_values]
        new = {key: tile for key, tile in zip(digests, pixel_values, strict=True) if key not in self._cache}
        self.queried += len(digests)
        self.found += len(digests) - len(new)
        known = {key: self._cache[key] for key in digests if key not in new} | self._computed(new)
        self._cache_features(known)
        return np.concatenate([known[key] for key in digests])

    def _computed(self, tiles: dict[bytes, np.ndarray[Any, Any]]) -> dict[bytes, Features]:
        """Features of each tile, several tiles in one call."""
        keys = list(tiles)
        found: dict[bytes, Features] = {}
        for first in range(0, len(keys), TILES_PER_CALL):
            some = keys[first : first + TILES_PER_CALL]
            rows = self._run(np.stack([tiles[key] for key in some]))
            wanted = (len(some) * self.config.tokens_per_tile, self.width)
            if rows.shape != wanted:
                raise HerdError(f"the image graph gives features {list(rows.shape)} for {len(some)} tiles, "
                                f"{list(wanted)} is needed: it belongs to another model; rebuild the bundle")
            found |= dict(zip(some, np.split(rows, len(some)), strict=True))
        return found

    def _cache_features(self, features: dict[bytes, Features]) -> None:
        for key, rows in features.items():
            self._cache[key] = rows
            self._cache.move_to_end(key)
        while sum(rows.nbytes for rows in self._cache.values()) > IMAGE_CACHE_BYTES:
            self._cache.popitem(last=False)
