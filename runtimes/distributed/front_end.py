"""The decoder of a sharded bundle: rank 0 runs its own part and tells the others what to run.

Every call is one command to all ranks, then rank 0's own part of it; the exchanges inside keep the ranks in step. In a
pipeline the logits come back from the last stage, and rank 0 goes on meanwhile: prompts run in prefill chunks, large
batches in as many parts as there are stages, and each stage works on another one. At most ``stages - 1`` of them are
beyond rank 0 whose logits it has not taken, so nobody can wait in a circle, whatever the transport can hold.

When a rank fails the engine is closed: what the ranks remember is no longer the same everywhere.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from typing import NoReturn

import numpy as np

from ...errors import HerdError
from ..bundle.manifest import Bundle
from ..executors.runner import Logits, Runner
from ..kv_cache.sequence import Features, Sequence, SequenceCache
from .collectives import Collectives
from .commands import Command, Kind, broadcast_command
from .launch import Processes, ShardOptions, join, launched_externally, load_shard, start
from .stage import Shard
from .worker import serve

PART = 4
"""Fewest sequences of a batch in one part: every part reads the weights again, so small ones are not worth it."""
GRACE = 5.0
"""Seconds that ranks have to end by themselves."""


class ShardedSequence(Sequence):
    """A sequence that the other ranks know by a number; its buffers here are rank 0's part.

    Args:
        runner: tells the others.
        cache: rank 0's part of its keys and values.
        width: of image features.
    """

    def __init__(self, runner: ShardedRunner, cache: SequenceCache, width: int) -> None:
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


class ShardedRunner(Runner):
    """All ranks behind the interface of one.

    Args:
        shard: rank 0's part.
        bundle: of all of them.
        processes: the other ranks when rank 0 has started them, otherwise None.
    """

    def __init__(self, shard: Shard, bundle: Bundle, processes: Processes | None) -> None:
        self.shard, self.config = shard.runner, bundle.manifest.config
        self.takes_features = self.shard.takes_features
        self._stage = shard.stage
        self._stages = self._stage.plan.pipeline
        self._awaited: deque[Logits] = deque()
        self._stage.before_send = lambda: self._collect(self._stages - 2)
        self._lock, self._keys, self._freed = threading.Lock(), itertools.count(), deque[int]()
        self.processes = processes
        if processes:
            weakref.finalize(self, processes.stop, 0.0)

    @property
    def link(self) -> Collectives:
        """Rank 0's exchanges, which count what they cost."""
        return self._stage.link

    def chunk_len(self, past: int) -> int:
        """A rank's: it has a part of the heads and memory of its own, so chunks may be longer than in one process."""
        return self.shard.chunk_len(past)

    # -- sequences -----------------------------------------------------------------------------------------------

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
        with self._call():
            twin = sequence.copy()
            self._tell(Command(Kind.FORK, [sequence.key, twin.key]))
            return twin

    # -- tokens in, logits out -----------------------------------------------------------------------------------

    def decode(self, sequence: Sequence, token_id: int) -> Logits:
        """Append one text token; see ``Runner``."""
        self.shard.check_fits(1, len(sequence) + 1)
        with self._call():
            logits = self._decode_part([sequence], [token_id])
            self._collect(0)
            return logits[0]

    def decode_batch(self, sequences: Items[Sequence], token_ids: Items[int]) -> Logits:
        """Append one text token to each of several sequences; see ``Runner``."""
        count = max(1, min(self._stages, len(sequences) // PART))
        ends = [len(sequences) * part // count for part in range(count + 1)]
        self.shard.check_fits(-(-len(sequences) // count), 1 + max(map(len, sequences)))
        with self._call():
            logits = [self._decode_part(sequences[begin:end], token_ids[begin:end])
                      for begin, end in itertools.pairwise(ends)]
            self._collect(0)
            return logits[0] if count == 1 else np.concatenate(logits)

    def prefill(self, sequence: Sequence, token_ids: Items[int], features: Features, *, all_positions: bool) -> Logits:
        """Append tokens in prefill chunks; see ``Runner``."""
        self.shard.check_fits(1, len(sequence) + len(token_ids))
        with self._call():
            return super().prefill(sequence, token_ids, features, all_positions=all_positions)

    def prefill_chunk(self, sequence: Sequence, token_ids: list[int], features: Features, rows: Features) -> Logits:
        """Compute a prefill chunk; see ``Runner``. In a pipeline the logits are there after ``settle``."""
        self._tell(self._command(Kind.PREFILL_CHUNK, [sequence], [token_ids], rows.tolist(), features))
        return self._await(self.shard.prefill_chunk(sequence, token_ids, features, rows))

    def settle(self) -> None:
        """Wait for logits that are on their way."""
        self._collect(0)

    def _decode_part(self, sequences: Items[Sequence], token_ids: Items[int]) -> Logits:
        """One token each for some sequences; [B, vocabulary]."""
        self._tell(self._command(Kind.DECODE, sequences, [[int(token)] for token in token_ids]))
        if len(sequences) == 1:
            return self._await(self.shard.decode(sequences[0], int(token_ids[0])).reshape(1, -1))
        return self._await(self.shard.decode_batch(sequences, token_ids))

    def _command(
        self, kind: Kind, sequences: Items[Sequence], ids_BT: Items[Items[int]], rows: Items[int] = (),
        features: Features | None = None,
    ) -> Command:
        keys = [sequence.key for sequence in sequences if isinstance(sequence, ShardedSequence)]
        return Command(kind, keys, [len(sequence) for sequence in sequences], ids_BT, rows, features)

    def _tell(self, command: Command) -> None:
        if self._freed:
            broadcast_command(self.link, Command(Kind.FREE, [self._freed.popleft() for _ in range(len(self._freed))]))
        broadcast_command(self.link, command)

    def _await(self, logits: Logits) -> Logits:
        """Expect logits from the last stage, unless rank 0 belongs to it."""
        if self._stages > 1:
            self._awaited.append(logits)
        return logits

    def _collect(self, left: int) -> None:
        """Take logits that come back, the oldest first, until so many are left."""
        while len(self._awaited) > left:
            self._stage.collect(self._awaited.popleft())

    # -- the end -------------------------------------------------------------------------------------------------

    @contextmanager
    def _call(self) -> Iterator[None]:
        """One call at a time; one that does not come to its end closes the engine."""
        with self._lock:
            if self.closed:
                raise HerdError(f"{self.closed}: load the bundle again")
            try:
                yield
            except BaseException as error:
                self._break(error)

    def _break(self, error: BaseException) -> NoReturn:
        """Close after a failure, and say what is known of it."""
        reason = _abandon(error, self.link, self.processes)
        herd = isinstance(error, HerdError)
        self.closed = "the engine was closed when " + (f"it failed ({reason})" if herd else "a call was interrupted")
        if not herd:
            raise error
        raise HerdError(f"{reason}; load the bundle again") from error

    def close(self) -> None:
        """End the other ranks."""
        with self._lock:
            if not self.closed:
                self.closed = "the engine was closed"
                try:
                    self._tell(Command(Kind.END))
                finally:
                    if self.processes:
                        self.processes.stop(GRACE)
                    self.shard.close()
                    self.link.close()


def load_sharded(bundle: Bundle, options: ShardOptions) -> ShardedRunner:
    """Load a sharded bundle with the other ranks.

    Where this process is one of several that somebody else has started, and not the first, it serves until the first
    one's engine is closed and then ends: this function does not return.

    Raises:
        HerdError: a rank cannot load, or they do not come together.
    """
    link, processes = (join(bundle, options), None) if launched_externally() else start(bundle, options)
    if link.rank:
        serve(bundle, link, options)
        raise SystemExit(0)
    try:
        return ShardedRunner(load_shard(bundle, link, options), bundle, processes)
    except HerdError as error:
        raise HerdError(_abandon(error, link, processes)) from error
    except BaseException as error:
        _abandon(error, link, processes)
        raise


def _abandon(error: BaseException, link: Collectives, processes: Processes | None) -> str:
    """Let the other ranks end after a failure; what is known of it."""
    reason = str(error) if isinstance(error, HerdError) else f"rank 0 was interrupted by {type(error).__name__}"
    link.fail(reason)
    exit_report = processes.exit_report() if processes else ""
    if processes:
        processes.stop(0.0)
    link.close()
    return exit_report or reason
