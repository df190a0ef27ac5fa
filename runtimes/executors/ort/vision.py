"""Runs the image graph on tiles, and remembers the features of pictures seen lately.

A conversation shows the model the same pictures with every turn, and many people ask about one picture: features are
kept by the SHA-256 of a tile's pixels, the least recently used are dropped.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import HerdError
from ....model.config import HerdConfig, VisionConfig
from ...kv_cache.sequence import Features
from .session import Memory, create_session

TILES_PER_CALL = 4
"""Tiles in one call: enough to fill the matrix products, few enough to bound the memory of activations."""

IMAGE_CACHE_BYTES = 256 << 20


class VisionRunner:
    """The image tower of a bundle on ONNX Runtime."""

    def __init__(self, graph: Path, config: HerdConfig, *, threads: int | None, memory: Memory = "fast") -> None:
        self._prepare(config)
        self.session = create_session(graph, threads=threads, memory=memory)

    def _prepare(self, config: HerdConfig) -> None:
        assert config.vision is not None, "a bundle with an image graph has an image configuration"
        self.config: VisionConfig = config.vision
        self.width = config.text.hidden_size
        self._remembered: OrderedDict[bytes, Features] = OrderedDict()

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
        digests = [digest(tile) for tile in pixel_values]
        new = {key: tile for key, tile in zip(digests, pixel_values, strict=True) if key not in self._remembered}
        known = {key: self._remembered[key] for key in digests if key not in new} | self._computed(new)
        self._cache_features(known)
        return np.concatenate([known[key] for key in digests])

    def run(self, pixel_values: np.ndarray[Any, Any]) -> Features:
        """Tiles to features in one call."""
        features: Features = self.session.run(None, {"pixel_values": pixel_values})[0]
        return features

    def _computed(self, tiles: dict[bytes, np.ndarray[Any, Any]]) -> dict[bytes, Features]:
        """Features of each tile, several tiles in one call."""
        keys = list(tiles)
        found: dict[bytes, Features] = {}
        for first in range(0, len(keys), TILES_PER_CALL):
            some = keys[first : first + TILES_PER_CALL]
            rows = self.run(np.stack([tiles[key] for key in some]))
            found |= dict(zip(some, np.split(rows, len(some)), strict=True))
        return found

    def _cache_features(self, features: dict[bytes, Features]) -> None:
        for key, rows in features.items():
            self._remembered[key] = rows
            self._remembered.move_to_end(key)
        while sum(rows.nbytes for rows in self._remembered.values()) > IMAGE_CACHE_BYTES:
            self._remembered.popitem(last=False)


def digest(tile: np.ndarray[Any, Any]) -> bytes:
    """What tells the pixels of one tile apart from others'."""
    return hashlib.sha256(np.ascontiguousarray(tile).data).digest()
