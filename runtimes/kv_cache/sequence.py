"""One sequence of tokens and what the model remembers of it."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from ...model.config import TextConfig
from .buffers import KVBuffers
from .memory import CacheMemory

Features = np.ndarray[Any, Any]


class Sequence:
    """Tokens that a model has seen, with their key/value buffers. Made by ``Engine.new_sequence``.

    Attributes:
        token_ids: every token so far, image tokens included.
        features: the image features behind the image tokens, in order, float32 [image tokens, width].
        tile_digests: content hash of every tile so far; equal ids do not mean equal pictures.
        buffers: keys and values.
        binding: the executor's own per-sequence state; dropped whenever buffers move.
    """

    def __init__(self, config: TextConfig, memory: CacheMemory | None = None) -> None:
        self.token_ids: list[int] = []
        self.features: Features = np.zeros((0, config.hidden_size), np.float32)
        self.tile_digests: list[bytes] = []
        self.buffers = KVBuffers(config, memory)
        self.binding: Any = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def reserve(self, tokens: int) -> None:
        """Make room for a total of ``tokens``."""
        if self.buffers.reserve(tokens):
            self.binding = None

    def fork(self) -> Self:
        """An independent sequence with the same past: the shared prefix is copied, not computed again."""
        twin = type(self).__new__(type(self))
        twin.token_ids = self.token_ids.copy()
        twin.features = self.features
        twin.tile_digests = self.tile_digests.copy()
        twin.buffers = self.buffers.copy()
        twin.binding = None
        return twin
