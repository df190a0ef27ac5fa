"""Several sequences decoded in one call: every weight is read once for all of them.

The sequences' buffers are moved side by side into buffers [B, kv_heads, slots, head_dim], which each sequence keeps
using through a view of its own row; so a sequence can still be prefilled, decoded alone, forked or truncated at any
time. As long as the same sequences come again and none has outgrown its row, a call moves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from ...model.config import TextConfig
from .memory import Buffer, CacheMemory
from .sequence import Sequence


class BatchedKVCache:
    """Rows of buffers for some sequences, each of which leaves its old buffers for a row here.

    Args:
        memory: where the buffers live.
        config: the decoder.
        sequences: in the order of the rows.

    Attributes:
        layers: keys and values [B, kv_heads, slots, head_dim] of all layers.
    """

    def __init__(self, memory: CacheMemory, config: TextConfig, sequences: Items[Sequence]) -> None:
        self.sequences, self._memory = tuple(sequences), memory
        tokens = 1 + max(len(sequence) for sequence in sequences)
        for sequence in sequences:
            sequence.make_room(tokens - len(sequence))
        self.layers = [self._joined(layer) for layer in range(config.num_layers)]
        self._rows = [sequence.cache.layers[-1] for sequence in sequences]

    def _joined(self, layer: int) -> tuple[Buffer, Buffer]:
        """One layer's keys and values of all sequences, which from now on use their rows.

        Layer by layer, so that no more than one layer is in memory twice.
        """
        old = [sequence.cache.layers[layer] for sequence in self.sequences]
        _, heads, _, width = old[0][0].shape
        slots = max(key.shape[2] for key, _ in old)
        shape = len(old), heads, slots, width
        joined = self._memory.zeros(shape), self._memory.zeros(shape)
        for index, (sequence, (key, value)) in enumerate(zip(self.sequences, old, strict=True)):
            rows = self._memory.row(joined[0], index), self._memory.row(joined[1], index)
            self._memory.copy(key, rows[0])
            self._memory.copy(value, rows[1])
            sequence.cache.move_layer(layer, rows)
            sequence.cache_moved()
        return joined

    def holds(self, sequences: Items[Sequence]) -> bool:
        """True when these are its sequences, in order, each still in its row with room for one more token."""
        return len(sequences) == len(self.sequences) and all(
            ours is theirs and ours.cache.layers[-1] is row and ours.cache.holds(len(ours) + 1)
            for ours, theirs, row in zip(self.sequences, sequences, self._rows, strict=True)
        )
