"""The host's part of running decoder plans: sizes, profiles, prefill chunks, and which slot a token's keys go to.

A plan reads the caches as they are and hands out the new tokens' keys and values. Where they belong is counted here, in
numbers; the executor only moves memory. Sequences of different lengths decode in one call, because the plan masks by
sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np

from ....errors import HerdError
from ....model.config import HerdConfig
from ...kv_cache.batch import BatchedKVCache
from ...kv_cache.memory import Buffer
from ...kv_cache.sequence import Features, Sequence
from ..runner import PREFILL_CHUNK, Logits, Runner
from .executor import Call, Executor, choose_profile


class PlanRunner(Runner):
    """A decoder plan behind the interface that ``Engine`` uses.

    Args:
        executor: holds the plan.
        config: the model; of a rank, what the rank holds of it.
        batches: whose buffers are kept side by side; a pipeline runs large ones in parts.
    """

    def __init__(self, executor: Executor, config: HerdConfig, *, batches: int = 1) -> None:
        self.executor, self.memory, self.takes_features = executor, executor.memory, executor.takes_features
        context = min(config.text.max_position_embeddings, self._largest("slots_global"))
        self.config = replace(config, text=replace(config.text, max_position_embeddings=context))
        chunk = self.attention_chunk
        if min(chunk, context) > (slots := self._largest("slots_local")):
            raise HerdError(f"chunked layers need {min(chunk, context)} slots, the plan was built for {slots}: build "
                            "it with other limits")
        self.longest_chunk = min(PREFILL_CHUNK, self._largest("tokens"))
        self._batches = deque[BatchedKVCache](maxlen=batches)

    def close(self) -> None:
        """See ``Runner``."""
        super().close()
        self.executor.close()

    def check_fits(self, batch: int, tokens: int) -> None:
        """See ``Runner``."""
        if tokens > (limit := self.config.text.max_position_embeddings):
            raise HerdError(f"{tokens} tokens are more than the {limit} that the plan was built for: build it with "
                            "other limits")
        if batch > (most := self._largest("batch")):
            raise HerdError(f"batch is {batch}, the plan was built for 1 to {most}: build it with other limits")

    def _largest(self, dimension: str) -> int:
        """Most of a dimension in any profile; without end when no profile has it."""
        sizes = [limits[dimension][1] for limits in self.executor.profiles if dimension in limits]
        return max(sizes, default=np.iinfo(np.int64).max)

    def prefill(self, sequence: Sequence, token_ids: Items[int], features: Features, *, all_positions: bool) -> Logits:
        """Append tokens; see ``Runner``."""
        self._reserve([sequence], len(token_ids))  # refused before anything is appended
        return super().prefill(sequence, token_ids, features, all_positions=all_positions)

    def decode(self, sequence: Sequence, token_id: int) -> Logits:
        """Append one text token; see ``Runner``."""
        self._reserve([sequence], 1)
        logits = self._run(sequence.cache.layers, [len(sequence)], [[token_id]])
        sequence.append([token_id])
        return logits[0, 0]

    def decode_batch(self, sequences: Items[Sequence], token_ids: Items[int]) -> Logits:
        """Append one text token to each of several sequences; see ``Runner``."""
        self._reserve(sequences, 1)
        batch = next((batch for batch in self._batches if batch.holds(sequences)), None)
        if batch is None:
            batch = BatchedKVCache(self.memory, self.config.text, sequences)
            self._batches.append(batch)
        lengths = [len(sequence) for sequence in sequences]
        logits = self._run(batch.layers, lengths, [[token] for token in token_ids])
        for sequence, token in zip(sequences, token_ids, strict=True):
            sequence.append([int(token)])
        return logits[:, 0]

    def prefill_chunk(self, sequence: Sequence, token_ids: list[int], features: Features, rows: Features) -> Logits:
        """Compute a prefill chunk; see ``Runner``."""
        self.check_fits(1, len(sequence) + len(token_ids))
        return self._run(sequence.cache.layers, [len(sequence)], [token_ids], features, rows)[0]

    def _reserve(self, sequences: Items[Sequence], tokens: int) -> None:
        self.check_fits(len(sequences), tokens + max(len(sequence) for sequence in sequences))
        for sequence in sequences:
            sequence.make_room(tokens)

    def _run(
        self, caches: Items[tuple[Buffer, Buffer]], lengths: list[int], token_ids: Items[Items[int]],
        features: Features | None = None, rows: Features | None = None,
    ) -> Logits:
        inputs = {
            "input_ids": np.asarray(token_ids, np.int64), "past_lengths": np.asarray(lengths, np.int64),
            "logit_rows": np.zeros(1, np.int64) if rows is None else rows,
        }
        if self.takes_features:
            empty = np.zeros((0, self.config.text.hidden_size), np.float32)
            inputs["image_features"] = empty if features is None else np.ascontiguousarray(features)
        profile = choose_profile(self.executor.profiles, self._sizes(caches, inputs))
        return self.executor.run(Call(profile, inputs, caches, self._first_slots(lengths)))

    def _sizes(self, caches: Items[tuple[Buffer, Buffer]], inputs: dict[str, Features]) -> dict[str, int]:
        batch, tokens = inputs["input_ids"].shape
        sizes = {"batch": batch, "tokens": tokens, "rows": len(inputs["logit_rows"])}
        if "image_features" in inputs:
            sizes["image_tokens"] = len(inputs["image_features"])
        for layer, (key, _) in enumerate(caches):
            sizes["slots_local" if self.config.text.chunk_of(layer) else "slots_global"] = key.shape[2]
        return sizes

    def _first_slots(self, lengths: list[int]) -> list[list[int]]:
        """Per layer, the slot of each sequence's next token."""
        chunks = [self.config.text.chunk_of(layer) for layer in range(self.config.text.num_layers)]
        return [[length % chunk if chunk else length for length in lengths] for chunk in chunks]
