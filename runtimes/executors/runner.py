"""What every decoder runner shares: prompts cut into pieces that no layer's chunk boundary runs through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from ...model.config import HerdConfig
from ..kv_cache.memory import CacheMemory
from ..kv_cache.sequence import Features, Sequence

PREFILL_CHUNK = 512
"""Longest piece of a prompt in one call: enough rows to fill the matrix products."""
SCORES_BYTES = 512 << 20
"""Attention scores of one layer in one call: pieces get shorter where the past is long."""
SHORTEST = 16

Logits = np.ndarray[Any, Any]


def prefill_chunk_len(heads: int, past: int, longest: int = PREFILL_CHUNK) -> int:
    """Tokens of a prompt in one call: fewer where the past is long, so that the scores of all heads stay small."""
    return min(longest, max(SHORTEST, SCORES_BYTES // (4 * heads * (past + longest))))


class Runner(ABC):
    """Runs a decoder for ``Engine``.

    Attributes:
        config: the model.
        memory: where the caches of its sequences live.
        longest: most tokens in one call.
        takes_features: whether the graph reads image features.
        closed: why it runs no more; empty while it does.
    """

    config: HerdConfig
    memory: CacheMemory
    longest: int = PREFILL_CHUNK
    takes_features: bool
    closed: str = ""

    @property
    def heads(self) -> int:
        """Query heads whose attention scores one call holds in one memory."""
        return self.config.text.num_heads

    def new_sequence(self) -> Sequence:
        """An empty sequence."""
        return Sequence(self.config.text, self.memory)

    @abstractmethod
    def decode(self, sequence: Sequence, token_id: int) -> Logits:
        """Append one text token. Returns its logits, float32 [vocabulary], valid until the next call."""

    @abstractmethod
    def decode_batch(self, sequences: Items[Sequence], token_ids: Items[int]) -> Logits:
        """Append one text token to each of several sequences.

        Returns:
            float32 [B, vocabulary], valid until the next call.
        """

    @abstractmethod
    def prefill_chunk(self, sequence: Sequence, piece: list[int], features: Features, rows: Features) -> Logits:
        """Append a piece.

        Args:
            sequence: has room for the piece.
            piece: tokens that do not cross a multiple of the chunk.
            features: one row per image token of the piece.
            rows: int64 [R], positions in the piece whose logits are wanted.

        Returns:
            float32 [R, vocabulary].
        """

    def prefill(self, sequence: Sequence, token_ids: Items[int], features: Features, *, all_positions: bool) -> Logits:
        """Append tokens in pieces that end at chunk boundaries.

        Args:
            sequence: grows by the tokens.
            token_ids: at least one.
            features: one row per image token among ``token_ids``.
            all_positions: logits of every token instead of the last one's.

        Returns:
            float32 [T, vocabulary], or [vocabulary] of the last token.
        """
        sequence.reserve(len(sequence) + len(token_ids))
        sequence.binding = None
        results: list[Logits] = []
        used = 0
        for piece in self.split(len(sequence), token_ids):
            images = piece.count(self.config.image_token_id) if self.takes_features else 0
            rows = np.arange(0 if all_positions else len(piece) - 1, len(piece), dtype=np.int64)
            results.append(self.prefill_chunk(sequence, piece, features[used : used + images], rows))
            sequence.token_ids += piece
            used += images
        self.settle()
        return np.concatenate(results) if all_positions else results[-1][-1]

    def settle(self) -> None:  # noqa: B027
        """Wait for logits of pieces that are still on their way; here there are none."""

    def close(self) -> None:  # noqa: B027
        """End what runs elsewhere; here nothing does."""

    def split(self, start: int, token_ids: Items[int]) -> list[list[int]]:
        """Cut tokens into pieces that are fast, bounded in memory, and do not cross a multiple of the chunk."""
        text = self.config.text
        chunk = text.attention_chunk_size if any(text.chunked_layers) else 0
        pieces: list[list[int]] = []
        begin = 0
        while begin < len(token_ids):
            past = start + begin
            length = prefill_chunk_len(self.heads, past, self.longest)
            end = min(len(token_ids), begin + min(length, chunk - past % chunk if chunk else length))
            pieces.append(list(token_ids[begin:end]))
            begin = end
        return pieces
