"""Key/value buffers of one sequence.

A layer with attention chunks of C tokens owns at most C slots and starts again at slot 0 every C tokens
(slot = position % C); a global layer owns a slot per token. Buffers double when they are full, so that short
sequences are cheap and a long one is copied O(log n) times.

Per token a layer needs 2 · kv_heads · head_dim elements: 4 bytes each in float32, 2 in bfloat16, 1 in int8 and FP8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items

from ...model.config import TextConfig
from .memory import Buffer, CacheMemory, HostMemory

FIRST_SLOTS = 256


class KVBuffers:
    """Keys and values of all layers, [1, kv_heads, slots, head_dim] each, where the executor wants them.

    Args:
        config: the decoder.
        memory: makes the buffers, None for the host's memory.
    """

    def __init__(self, config: TextConfig, memory: CacheMemory | None = None) -> None:
        self.config, self.memory = config, memory or HostMemory()
        self._layers: list[tuple[Buffer, Buffer]] = []
        self.make_room(0, 1)

    @property
    def layers(self) -> Items[tuple[Buffer, Buffer]]:
        """Keys and values of each layer."""
        return self._layers

    def make_room(self, first: int, end: int) -> bool:
        """Make room for positions up to ``end``; True when a buffer had to move. See ``SequenceCache``."""
        del first
        if self._layers and self.holds(end):
            return False
        wanted = [self._slots(layer, end) for layer in range(self.config.num_layers)]
        old = self._layers or [(None, None)] * len(wanted)
        self._layers = [
            (self._grown(key, slots), self._grown(value, slots))
            for (key, value), slots in zip(old, wanted, strict=True)
        ]
        return True

    def move_layer(self, layer: int, buffers: tuple[Buffer, Buffer]) -> None:
        """Use other buffers for a layer from now on, which hold at least as much."""
        self._layers[layer] = buffers

    def holds(self, tokens: int) -> bool:
        """True when every layer has a slot for each of ``tokens`` positions that it has to remember."""
        limit = self.config.max_position_embeddings
        return all(
            key.shape[2] >= min(tokens, self.config.chunk_of(layer) or limit)
            for layer, (key, _) in enumerate(self._layers)
        )

    def _slots(self, layer: int, tokens: int) -> int:
        """Slots that a layer needs: a power of two times ``FIRST_SLOTS``, never more than its chunk or the context."""
        slots = FIRST_SLOTS
        while slots < tokens:
            slots *= 2
        limit = self.config.max_position_embeddings
        return min(slots, limit, self.config.chunk_of(layer) or limit)

    def _grown(self, old: Buffer | None, slots: int) -> Buffer:
        """The buffer itself when it is large enough, otherwise a longer copy."""
        if old is not None and old.shape[2] >= slots:
            return old
        new = self.memory.zeros((1, self.config.num_kv_heads, slots, self.config.head_dim))
        if old is not None:
            self.memory.copy(old, new)
        return new

    def truncate(self, length: int) -> None:
        """Nothing: buffers stay, and the next tokens overwrite what was forgotten. See ``SequenceCache``."""

    def fork(self, length: int) -> KVBuffers:
        """An independent copy. See ``SequenceCache``."""
        del length
        twin = KVBuffers.__new__(KVBuffers)
        twin.config, twin.memory = self.config, self.memory
        twin._layers = [(self._copied(key), self._copied(value)) for key, value in self._layers]
        return twin

    def _copied(self, buffer: Buffer) -> Buffer:
        new = self.memory.zeros(buffer.shape)
        self.memory.copy(buffer, new)
        return new

    @property
    def element_bytes(self) -> float:
        """See ``SequenceCache``."""
        key = self._layers[0][0]
        return key.nbytes / math.prod(key.shape)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(key.nbytes + value.nbytes for key, value in self._layers)
