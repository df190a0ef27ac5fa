"""A rank other than the first: does what rank 0 says until it ends, or until rank 0 is gone.

``python -m herdgraph.runtimes.distributed.worker OPTIONS`` (JSON) is what ``launch.py`` starts.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from abc import ABC, abstractmethod

import numpy as np

from ...errors import HerdError
from ..bundle.manifest import Bundle
from ..executors.blocks import BlockRunner
from ..executors.runner import Runner
from ..kv_cache.sequence import Sequence
from .collectives import Collectives, RankError
from .commands import Command, Kind, Message, StepCommand, receive_message
from .options import ShardOptions
from .processes import EXIT_REPORTED
from .shard import load_shard
from .shared_memory import SharedMemory
from .stage import plan_of


class Worker(ABC):
    """Does what rank 0 says.

    Args:
        shard: runs what this rank holds.
        link: this rank's exchanges.
    """

    def __init__(self, shard: Runner, link: Collectives) -> None:
        self._link, self._width = link, shard.config.text.hidden_size

    def serve(self) -> None:
        """Do what rank 0 says until it ends."""
        while (message := receive_message(self._link, self._width)).kind != Kind.END:
            self.follow(message)

    @abstractmethod
    def follow(self, message: Message) -> None:
        """Follow one command."""


class PagedWorker(Worker):
    """A rank whose keys and values lie in cache blocks: it keeps no sequences.

    Args:
        shard: runs what this rank holds.
        link: this rank's exchanges.
    """

    def __init__(self, shard: BlockRunner, link: Collectives) -> None:
        super().__init__(shard, link)
        self.shard = shard

    def follow(self, message: Message) -> None:
        """Follow one command."""
        command, pools = StepCommand.of(message), self.shard.pools
        for of_chunked, block, twin in command.copies:
            (pools.chunked if of_chunked else pools.whole).copy(block, twin)
        self.shard.compute(command.steps)


class BufferedWorker(Worker):
    """The sequences of a rank, known by the numbers that rank 0 gives them.

    Args:
        shard: runs what this rank holds.
        link: this rank's exchanges.
    """

    def __init__(self, shard: Runner, link: Collectives) -> None:
        super().__init__(shard, link)
        self.shard = shard
        self.sequences: dict[int, Sequence] = {}

    def follow(self, message: Message) -> None:
        """Follow one command."""
        self.do(Command.of(message))

    def do(self, command: Command) -> None:
        """Follow one command."""
        if command.kind == Kind.FREE:
            for key in command.keys:
                self.sequences.pop(key, None)
        elif command.kind == Kind.FORK:
            source, target = command.keys
            self.sequences[target] = self._sequence(source).fork()
        elif command.kind == Kind.PREFILL_CHUNK:
            self._prefill_chunk(self._continued(command)[0], command)
        elif len(command.keys) == 1:
            self.shard.decode(self._continued(command)[0], command.ids_BT[0][0])
        else:
            self.shard.decode_batch(self._continued(command), [ids[0] for ids in command.ids_BT])

    def _prefill_chunk(self, sequence: Sequence, command: Command) -> None:
        [ids], features = command.ids_BT, command.features_PD
        assert features is not None
        sequence.make_room(len(ids))
        self.shard.prefill_chunk(sequence, list(ids), features, np.asarray(command.rows, np.int64))
        sequence.append(ids)

    def _continued(self, command: Command) -> list[Sequence]:
        """The sequences of a command, without what rank 0 has forgotten."""
        sequences = [self._sequence(key) for key in command.keys]
        for sequence, length in zip(sequences, command.lengths, strict=True):
            sequence.truncate(length)
        return sequences

    def _sequence(self, key: int) -> Sequence:
        if key not in self.sequences:
            self.sequences[key] = self.shard.new_sequence()
        return self.sequences[key]


def serve(bundle: Bundle, link: Collectives, options: ShardOptions) -> None:
    """Load this rank's part and serve until rank 0 ends; what goes wrong is told to the other ranks.

    Raises:
        HerdError: this rank or another failed.
    """
    try:
        shard, stage = load_shard(bundle, link, options)
        link = stage.link
        worker = PagedWorker(shard, link) if isinstance(shard, BlockRunner) else BufferedWorker(shard, link)
        worker.serve()
        shard.close()
    except RankError:
        raise
    except Exception as error:
        message = f"rank {link.rank}: {_told(error)}"
        link.fail(message)
        raise HerdError(message) from error
    finally:
        link.close()


_OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|failed to allocate|bad_alloc", re.IGNORECASE)


def _told(error: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, HerdError):
        return text
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text):
        return "out of memory: split the model over more ranks, or use a smaller recipe or a shorter context"
    return f"{type(error).__name__}: {text}"


def main() -> None:
    """Serve as the command line says; rank 0 decides when to end, not the terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raw = json.loads(sys.argv[1])
    directory, rank, descriptor = raw.pop("bundle"), raw.pop("rank"), raw.pop("descriptor")
    options = ShardOptions(**{**raw, "devices": tuple(raw["devices"])})
    bundle = Bundle.open(directory, verify=False)
    plan = plan_of(bundle)
    link = SharedMemory(descriptor, rank, plan.world, plan.group_of(rank), timeout=options.timeout)
    try:
        serve(bundle, link, options)
    except HerdError:
        sys.exit(EXIT_REPORTED)


if __name__ == "__main__":
    main()
