"""What every decoder runner shares: prompts in prefill chunks, truncation, and the interface that ``Engine`` uses.

A *prefill chunk* is what one call computes of a prompt. It never crosses a multiple of the model's *attention chunk*,
since the buffers of chunked layers start again there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import numpy as np

from ...errors import HerdError
from ...model.config import HerdConfig
from ..kv_cache.buffers import KVBuffers
from ..kv_cache.memory import CacheMemory
from ..kv_cache.paged import CachePools
from ..kv_cache.sequence import Features, Sequence, SequenceCache

PREFILL_CHUNK = 512
"""Most tokens of a prompt in one call: enough rows to fill the matrix products."""
SHORTEST_CHUNK = 16
SCORES_BYTES = 512 << 20
"""Attention scores of one layer in one call: prefill chunks get shorter where the past is long."""

Logits = np.ndarray[Any, Any]
Row = Logits | int
"""What is known after a token: its logits, float32 [vocabulary], or no more than the most likely next token."""


class Step(NamedTuple):
    """What one sequence gets in a call.

    Attributes:
        sequence: grows by the tokens.
        token_ids: at least one; they do not cross a multiple of the attention chunk.
        rows: places among them whose logits are wanted, in order.
        features: one row per image token among them.
        greedy: whether the most likely token is all that is wanted of each row.
        never: tokens that are not to be chosen: where one is the most likely, logits are wanted after all.
    """

    sequence: Sequence
    token_ids: Items[int]
    rows: Items[int]
    features: Features | None = None
    greedy: bool = False
    never: Items[int] = ()


def prefill_chunk_len(heads: int, past: int, longest: int = PREFILL_CHUNK) -> int:
    """Tokens of a prompt in one call: fewer where the past is long, so that the scores of all heads stay small."""
    return min(longest, max(SHORTEST_CHUNK, SCORES_BYTES // (4 * heads * (past + longest))))


class Runner(ABC):
    """Runs a decoder for ``Engine``.

    Attributes:
        config: the model.
        memory: where the caches of its sequences live.
        pools: cache blocks that its sequences share, None where each has buffers of its own.
        longest_chunk: most tokens in one call.
        takes_features: whether the graph reads image features.
        closed: why it runs no more; empty while it does.
    """

    config: HerdConfig
    memory: CacheMemory
    pools: CachePools | None = None
    longest_chunk: int = PREFILL_CHUNK
    takes_features: bool
    closed: str = ""

    @property
    def attention_chunk(self) -> int:
        """Tokens of the attention chunk, 0 when every layer sees the whole past."""
        text = self.config.text
        return text.attention_chunk_size if any(text.chunked_layers) else 0

    def new_sequence(self) -> Sequence:
        """An empty sequence."""
        return Sequence(self.new_cache(), self.config.text.hidden_size)

    def new_cache(self) -> SequenceCache:
        """Keys and values of an empty sequence: in buffers of its own, unless the runner has blocks to share."""
        return KVBuffers(self.config.text, self.memory)

    @abstractmethod
    def decode(self, sequence: Sequence, token_id: int) -> Logits:
        """Append one text token. Returns its logits, float32 [vocabulary], valid until the next call."""

    @abstractmethod
    def decode_batch(self, sequences: Items[Sequence], token_ids: Items[int]) -> Logits:
        """Append one text token to each of several sequences.

        Returns:
            float32 [B, vocabulary], valid until the next call.
        """

    def step(self, steps: Items[Step]) -> Logits:
        """Append tokens to several sequences; here prompts one after the other, then all single tokens together.

        Args:
            steps: of different sequences.

        Returns:
            float32 [rows, vocabulary], the rows of all steps in order; valid until the next call.

        Raises:
            HerdError: there is no room for keys and values.
        """
        found: dict[int, Logits] = {}
        single = [index for index, step in enumerate(steps) if len(step.token_ids) == 1 and list(step.rows) == [0]
                  and (step.features is None or not len(step.features))]
        for index in sorted(set(range(len(steps))) - set(single)):
            step = steps[index]
            none = np.zeros((0, self.config.text.hidden_size), np.float32)
            features = none if step.features is None else step.features
            some = list(step.rows) not in ([], [len(step.token_ids) - 1])
            logits = self.prefill(step.sequence, step.token_ids, features, all_positions=some)
            found[index] = logits[list(step.rows)] if some else logits[None][: len(step.rows)]
        if single:
            of_single = self.decode_batch([steps[index].sequence for index in single],
                                          [steps[index].token_ids[0] for index in single])
            found |= {index: of_single[place : place + 1] for place, index in enumerate(single)}
        return np.concatenate([found[index] for index in range(len(steps))])

    def rows(self, steps: Items[Step]) -> list[Row]:
        """Append tokens as ``step`` does. Where logits are far away, of greedy steps the best tokens come back."""
        return list(self.step(steps))

    def decode_greedy(self, sequence: Sequence, token_id: int, never: Items[int] = ()) -> Row:
        """Append one text token, where the most likely next one is all that is wanted; see ``Step``."""
        return self.decode(sequence, token_id)

    def warm_up(self, sequences: int) -> None:  # noqa: B027
        """Prepare calls of up to so many sequences, where the first one of a size takes long; here none does."""

    @abstractmethod
    def prefill_chunk(self, sequence: Sequence, token_ids: list[int], features: Features, rows: Features) -> Logits:
        """Compute a prefill chunk; the caller appends its tokens to the sequence.

        Args:
            sequence: has room for the tokens.
            token_ids: they do not cross a multiple of the attention chunk.
            features: one row per image token of the chunk.
            rows: int64 [R], positions in the chunk whose logits are wanted.

        Returns:
            float32 [R, vocabulary].
        """

    def prefill(self, sequence: Sequence, token_ids: Items[int], features: Features, *, all_positions: bool) -> Logits:
        """Append tokens, one prefill chunk after the other.

        Args:
            sequence: grows by the tokens.
            token_ids: at least one.
            features: one row per image token among ``token_ids``.
            all_positions: logits of every token instead of the last one's.

        Returns:
            float32 [T, vocabulary], or [vocabulary] of the last token; of fewer tokens where somebody stops the
            sequence meanwhile.
        """
        self.make_room(sequence, len(token_ids))
        results: list[Logits] = []
        used = 0
        for chunk in self.chunk_prompt(len(sequence), token_ids):
            images = chunk.count(self.config.image_token_id) if self.takes_features else 0
            rows = np.arange(0 if all_positions else len(chunk) - 1, len(chunk), dtype=np.int64)
            results.append(self.prefill_chunk(sequence, chunk, features[used : used + images], rows))
            sequence.append(chunk)
            used += images
            if sequence.is_stopped:
                break
        self.settle()
        return np.concatenate(results) if all_positions else results[-1][-1]

    def make_room(self, sequence: Sequence, tokens: int) -> None:
        """Find room for a whole prompt before any of it is computed, where room can be found beforehand."""
        sequence.make_room(tokens)

    def check_fits(self, batch: int, tokens: int) -> None:  # noqa: B027
        """Refuse a call that what was built cannot run; here the model's context is the only limit.

        Args:
            batch: sequences.
            tokens: of the longest, after the call.

        Raises:
            HerdError: says both numbers.
        """

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget all but the first ``length`` tokens, of which there are as many or more.

        Global layers only forget. A chunked layer whose buffer has been reused since is filled again by running the
        tokens of the last attention chunk once more.
        """
        chunk, begin = self.attention_chunk, length
        if chunk and length % chunk and (sequence.written - 1) // chunk != (length - 1) // chunk:
            begin = length // chunk * chunk
        again = sequence.token_ids[begin:length]
        first, last = (self._image_tokens(sequence.token_ids[:end]) for end in (begin, length))
        sequence.truncate(begin)
        if again:
            with sequence.stopped_by(lambda: False):  # a part of what was to stay would be no past at all
                self.prefill(sequence, again, sequence.features[first:last], all_positions=False)
        vision = self.config.vision
        sequence.truncate_images(last, -(-last // vision.tokens_per_tile) if vision else 0)

    def _image_tokens(self, token_ids: Items[int]) -> int:
        return token_ids.count(self.config.image_token_id) if self.config.vision else 0

    def settle(self) -> None:  # noqa: B027
        """Wait for logits of chunks that are still on their way; here there are none."""

    def wait_until_resident(self) -> None:  # noqa: B027
        """Wait until weights lie where they stay; here they do from the beginning."""

    def close(self) -> None:
        """Free what is held and end what runs elsewhere; the engine then refuses every call."""
        self.closed = self.closed or "the engine was closed"

    def require_open(self) -> None:
        """Refuse to run any more.

        Raises:
            HerdError: it was closed, or a rank failed.
        """
        if self.closed:
            raise HerdError(f"{self.closed}: load the bundle again")

    def chunk_len(self, past: int) -> int:
        """Most tokens of a prompt in one call after so many others; attention scores of the call lie in one memory."""
        return prefill_chunk_len(self.config.text.num_heads, past, self.longest_chunk)

    def chunk_prompt(self, past: int, token_ids: Items[int]) -> list[list[int]]:
        """Cut a prompt into prefill chunks.

        Args:
            past: tokens before the prompt.
            token_ids: the prompt.
        """
        chunks: list[list[int]] = []
        begin = 0
        while begin < len(token_ids):
            at = past + begin
            length = self.chunk_len(at)
            if self.attention_chunk:
                length = min(length, self.attention_chunk - at % self.attention_chunk)
            chunks.append(list(token_ids[begin : begin + length]))
            begin += length
        return chunks
