"""Key/value buffers of one sequence.

A layer with attention chunks of C tokens owns at most C slots and starts again at slot 0 every C tokens
(slot = position % C); a global layer owns a slot per token. Buffers double when they are full, so that short
sequences are cheap and a long one is copied O(log n) times.

Per token a layer needs 2 · kv_heads · head_dim elements: 4 bytes each in float32, 1 in int8.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..model.config import TextConfig

FIRST_SLOTS = 256

Buffer = np.ndarray[Any, Any]
DType = type[np.float32] | type[np.int8]


class KVBuffers:
    """Keys and values of all layers, [1, kv_heads, slots, head_dim] each, in the type that the graph takes."""

    def __init__(self, config: TextConfig, dtype: DType = np.float32) -> None:
        self.config, self.dtype = config, dtype
        self.layers: list[tuple[Buffer, Buffer]] = []
        self.reserve(1)

    def reserve(self, tokens: int) -> bool:
        """Make room for ``tokens`` positions; True when a buffer had to move."""
        if self.layers and self.holds(tokens):
            return False
        wanted = [self._slots(layer, tokens) for layer in range(self.config.num_layers)]
        empty = np.zeros((1, self.config.num_kv_heads, 0, self.config.head_dim), self.dtype)
        old = self.layers or [(empty, empty)] * len(wanted)
        self.layers = [(_grown(k, slots), _grown(v, slots)) for (k, v), slots in zip(old, wanted, strict=True)]
        return True

    def holds(self, tokens: int) -> bool:
        """True when every layer has a slot for each of ``tokens`` positions that it has to remember."""
        limit = self.config.max_position_embeddings
        return all(
            key.shape[2] >= min(tokens, self.config.chunk_of(layer) or limit)
            for layer, (key, _) in enumerate(self.layers)
        )

    def _slots(self, layer: int, tokens: int) -> int:
        """Slots that a layer needs: a power of two times ``FIRST_SLOTS``, never more than its chunk or the context."""
        slots = FIRST_SLOTS
        while slots < tokens:
            slots *= 2
        return min(slots, self.config.chunk_of(layer) or self.config.max_position_embeddings)

    def copy(self) -> KVBuffers:
        """An independent copy."""
        twin = KVBuffers.__new__(KVBuffers)
        twin.config, twin.dtype = self.config, self.dtype
        twin.layers = [(k.copy(), v.copy()) for k, v in self.layers]
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(k.nbytes + v.nbytes for k, v in self.layers)


def _grown(old: Buffer, slots: int) -> Buffer:
    """The buffer itself when it is large enough, otherwise a longer copy."""
    batch, heads, held, width = old.shape
    if held >= slots:
        return old
    # Zeros, not garbage: a masked slot still meets a weight of 0, and 0 · NaN would be NaN.
    new = np.zeros((batch, heads, slots, width), old.dtype)
    new[:, :, :held] = old
    return new
