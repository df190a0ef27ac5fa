"""Rank 0 where every sequence has buffers of its own on every rank: the others know sequences by number.

Lengths imply truncation; forks and sequences that are gone are commands, too.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Sequence as Items

from ..bundle.manifest import Bundle
from ..executors.runner import Logits, Runner
from ..kv_cache.sequence import Features, Sequence, SequenceCache
from .commands import Command, Kind, Message
from .front_end import ShardedRunner
from .processes import Processes
from .stage import Stage


class ShardedSequence(Sequence):
    """A sequence that the other ranks know by a number; its buffers here are rank 0's part.

    Args:
        runner: tells the others.
        cache: rank 0's part of its keys and values.
        width: of image features.
    """

    def __init__(self, runner: BufferedShards, cache: SequenceCache, width: int) -> None:
        super().__init__(cache, width)
        self._runner = runner
        self.key = runner.known(self)

    def fork(self) -> ShardedSequence:
        """An independent sequence with the same past, on every rank."""
        return self._runner.fork(self)

    def copy(self) -> ShardedSequence:
        """Rank 0's part of a fork, under a number of its own."""
        twin = super().fork()
        assert isinstance(twin, ShardedSequence)
        twin._runner = self._runner
        twin.key = self._runner.known(twin)
        return twin


class BufferedShards(ShardedRunner):
    """See the module; arguments as of ``ShardedRunner``.

    Args:
        shard: rank 0's part.
        stage: its exchanges with the other ranks.
        bundle: of all of them.
        processes: the other ranks when rank 0 has started them, otherwise None.
    """

    def __init__(self, shard: Runner, stage: Stage, bundle: Bundle, processes: Processes | None) -> None:
        super().__init__(shard, stage, bundle, processes)
        self.shard = shard
        self._keys, self._freed = itertools.count(), deque[int]()

    def new_sequence(self) -> ShardedSequence:
        """An empty sequence."""
        return ShardedSequence(self, self.shard.new_cache(), self.config.text.hidden_size)

    def known(self, sequence: ShardedSequence) -> int:
        """A number for a sequence; the others forget it when the sequence is gone."""
        key = next(self._keys)
        weakref.finalize(sequence, self._freed.append, key).atexit = False
        return key

    def fork(self, sequence: ShardedSequence) -> ShardedSequence:
        """See ``ShardedSequence``."""
        with self.call():
            twin = sequence.copy()
            self.tell(Command(Kind.FORK, [sequence.key, twin.key]).message())
            return twin

    # -- tokens in, logits out -----------------------------------------------------------------------------------

    def decode(self, sequence: Sequence, token_id: int) -> Logits:
        """Append one text token; see ``Runner``."""
        self.shard.check_fits(1, len(sequence) + 1)
        with self.call():
            logits = self._decode_part([sequence], [token_id])
            self.collect(0)
            return logits[0]

    def decode_batch(self, sequences: Items[Sequence], token_ids: Items[int]) -> Logits:
        """Append one text token to each of several sequences; see ``Runner``."""
        parts = self.parts(len(sequences))
        self.shard.check_fits(-(-len(sequences) // len(parts)), 1 + max(map(len, sequences)))
        with self.call():
            return self.joined([self._decode_part(sequences[part], token_ids[part]) for part in parts])

    def prefill(self, sequence: Sequence, token_ids: Items[int], features: Features, *, all_positions: bool) -> Logits:
        """Append tokens in prefill chunks; see ``Runner``."""
        self.shard.check_fits(1, len(sequence) + len(token_ids))
        with self.call():
            return super().prefill(sequence, token_ids, features, all_positions=all_positions)

    def prefill_chunk(self, sequence: Sequence, token_ids: list[int], features: Features, rows: Features) -> Logits:
        """Compute a prefill chunk; see ``Runner``. In a pipeline the logits are there after ``settle``."""
        self.tell(self._message(Kind.PREFILL_CHUNK, [sequence], [token_ids], rows.tolist(), features))
        return self.awaited(self.shard.prefill_chunk(sequence, token_ids, features, rows))

    def settle(self) -> None:
        """Wait for logits that are on their way."""
        self.collect(0)

    def _decode_part(self, sequences: Items[Sequence], token_ids: Items[int]) -> Logits:
        """One token each for some sequences; [B, vocabulary]."""
        self.tell(self._message(Kind.DECODE, sequences, [[int(token)] for token in token_ids]))
        if len(sequences) == 1:
            return self.awaited(self.shard.decode(sequences[0], int(token_ids[0])).reshape(1, -1))
        return self.awaited(self.shard.decode_batch(sequences, token_ids))

    def _message(
        self, kind: Kind, sequences: Items[Sequence], ids_BT: Items[Items[int]], rows: Items[int] = (),
        features: Features | None = None,
    ) -> Message:
        keys = [sequence.key for sequence in sequences if isinstance(sequence, ShardedSequence)]
        return Command(kind, keys, [len(sequence) for sequence in sequences], ids_BT, rows, features).message()

    def tell(self, message: Message) -> None:
        """See ``ShardedRunner``; sequences that are gone first."""
        if self._freed:
            super().tell(Command(Kind.FREE, [self._freed.popleft() for _ in range(len(self._freed))]).message())
        super().tell(message)
