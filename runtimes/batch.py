"""Several sequences decoded in one call: every weight is read once for all of them.

The sequences' buffers are moved side by side into arrays [B, kv_heads, slots, head_dim], which each sequence keeps
using through a view of its own row; so a sequence can still be prefilled, decoded alone, forked or truncated at any
time. As long as the same sequences come again and none has outgrown its row, a call binds and copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any

import numpy as np

from .cache import Buffer
from .sequence import Sequence

if TYPE_CHECKING:
    from .decoder import DecoderRunner


class DecodeBatch:
    """Rows of buffers for some sequences, bound once.

    Args:
        runner: the decoder.
        sequences: in the order of the rows; each leaves its old buffers for a row here.
    """

    def __init__(self, runner: DecoderRunner, sequences: Items[Sequence]) -> None:
        self.sequences, config = tuple(sequences), runner.config.text
        tokens = 1 + max(len(sequence) for sequence in sequences)
        for sequence in sequences:
            sequence.reserve(tokens)
        self.layers = [self._side_by_side(layer) for layer in range(config.num_layers)]
        for sequence in sequences:
            sequence.binding = None
        self.input_ids = np.zeros((len(sequences), 1), np.int64)
        self.past_lengths = np.zeros(len(sequences), np.int64)
        self.logits = np.zeros((len(sequences), 1, config.vocab_size), np.float32)
        features = np.zeros((0, config.hidden_size), np.float32)
        self.io = runner.bind(
            self.layers, self.input_ids, self.past_lengths, np.zeros(1, np.int64), features, self.logits
        )

    def _side_by_side(self, layer: int) -> tuple[Buffer, Buffer]:
        """One layer's keys and values of all sequences, which from now on use their rows."""
        old = [sequence.buffers.layers[layer] for sequence in self.sequences]
        slots = max(key.shape[2] for key, _ in old)
        _, heads, _, width = old[0][0].shape
        keys, values = (np.zeros((len(old), heads, slots, width), old[0][0].dtype) for _ in range(2))
        for row, (sequence, (key, value)) in enumerate(zip(self.sequences, old, strict=True)):
            keys[row, :, : key.shape[2]], values[row, :, : value.shape[2]] = key[0], value[0]
            sequence.buffers.layers[layer] = keys[row : row + 1], values[row : row + 1]
        return keys, values

    def holds(self, sequences: Items[Sequence]) -> bool:
        """True when these are its sequences, in order, each still in its row with room for one more token."""
        return len(sequences) == len(self.sequences) and all(
            ours is theirs and ours.buffers.layers[-1][0].base is self.layers[-1][0]
            and ours.buffers.holds(len(ours) + 1)
            for ours, theirs in zip(self.sequences, sequences, strict=True)
        )

    def run(self, session: Any, token_ids: Items[int]) -> np.ndarray[Any, Any]:
        """Append one token to each sequence; float32 [B, vocabulary], valid until the next call."""
        self.input_ids[:, 0] = token_ids
        self.past_lengths[:] = [len(sequence) for sequence in self.sequences]
        session.run_with_iobinding(self.io)
        for sequence, token in zip(self.sequences, token_ids, strict=True):
            sequence.token_ids.append(int(token))
        return self.logits[:, 0]
