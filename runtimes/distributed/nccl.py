"""Exchanges between GPUs through NCCL, one process per GPU. Not run on hardware: tested on a hollow NCCL.

Hidden states never leave the GPUs: sums, joined rows and what stages hand on are put on the stream that the partitions
run on, and nobody waits before the call's end. Commands, and logits on their way to rank 0, are in the host's memory
and go through the host's transport, as without GPUs. It also carries NCCL's unique ids when the ranks meet, and tells
of failures (``watch.py``).

Two communicators: that of the stage, and in a pipeline one of all ranks for what stages hand on. Both are used on one
stream, and by every rank in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np

from ...model.config.shard_plan import ShardPlan
from ..executors.device_array import DeviceArray
from .collectives import Array, Collectives, Values
from .libnccl import UNIQUE_ID_BYTES, Communicator, Library, NcclError, load, told
from .watch import Stream, Watch


class Nccl(Collectives):
    """See the module.

    Args:
        host: the ranks' exchanges in the host's memory.
        plan: arranges the ranks in stages.
        stream: on which exchanges happen; ONNX Runtime's ``user_compute_stream``, or that of TensorRT's plans.

    Attributes:
        watch: begins and ends calls; sees that the others are there meanwhile.

    Raises:
        HerdError: NCCL is missing, too old, or not the same on all ranks.
        RankError: another rank does not come.
    """

    def __init__(self, host: Collectives, plan: ShardPlan, stream: Stream) -> None:
        super().__init__(host.rank, host.world, host.group, host.timeout)
        self.host, self.stream = host, stream
        # Algorithms that add each element up in one place: all ranks see the same bits.
        os.environ.setdefault("NCCL_ALGO", "Ring,Tree")
        library, several = load(), plan.pipeline > 1
        host.barrier()  # ranks come at different times
        self._check_same(library)
        self.watch = Watch(host, stream)
        ids = self._unique_ids(library, plan.pipeline + several)
        try:
            self._stage = self._meet(library, ids[plan.stage_of(self.rank)], self.group)
            self._everybody = self._meet(library, ids[-1], range(self.world)) if several else self._stage
        except BaseException:
            self.watch.abort()
            raise

    # -- coming together -----------------------------------------------------------------------------------------

    def _check_same(self, library: Library) -> None:
        first = np.array([library.version], np.int64)
        self.host.broadcast(first)
        if first[0] != library.version:
            raise NcclError(f"rank {self.rank} has NCCL {told(library.version)}, rank 0 has {told(int(first[0]))}: "
                            "install the same on every machine")

    def _unique_ids(self, library: Library, count: int) -> list[bytes]:
        """Ids of so many communicators, made by rank 0."""
        made = b"".join(library.unique_id() for _ in range(count)) if self.rank == 0 else bytes(count * UNIQUE_ID_BYTES)
        ids = np.frombuffer(made, np.uint8).reshape(count, -1).copy()
        self.host.broadcast(ids)
        return [row.tobytes() for row in ids]

    def _meet(self, library: Library, unique_id: bytes, ranks: range) -> Communicator:
        made = self.watch.patiently(lambda: library.communicator(unique_id, len(ranks), ranks.index(self.rank)))
        self.watch.communicators.append(made)
        return made

    def capsule(self) -> Any:
        """The stage's communicator as TensorRT takes it."""
        return self._stage.capsule()

    # -- exchanges on the GPUs -----------------------------------------------------------------------------------

    def all_reduce(self, value: DeviceArray, result: DeviceArray) -> None:
        """See ``Collectives``."""
        with self._exchange():
            self._stage.all_reduce(value.pointer, result.pointer, value.size, value.dtype, self.stream.handle)

    def all_gather(self, value: DeviceArray, result: DeviceArray) -> None:
        """See ``Collectives``; NCCL itself would put whole arrays one after the other."""
        rows, width = prod(value.shape[:-1]), len(self.group)
        with self._exchange():
            self._stage.all_gather_rows(value.pointer, result.pointer, rows, value.nbytes // max(1, rows), width,
                                        self.stream.handle)

    def send(self, value: Values, target: int) -> None:
        """See ``Collectives``; an array in the host's memory goes through the host's transport."""
        if isinstance(value, np.ndarray):
            self.host.send(value, target)
            return
        with self._exchange(target):
            self._everybody.send(value.pointer, value.size, value.dtype, target, self.stream.handle)

    def receive(self, result: Values, source: int) -> None:
        """See ``Collectives``; an array in the host's memory comes through the host's transport."""
        if isinstance(result, np.ndarray):
            self.host.receive(result, source)
            return
        with self._exchange(source):
            self._everybody.receive(result.pointer, result.size, result.dtype, source, self.stream.handle)

    @contextmanager
    def _exchange(self, peer: int | None = None) -> Iterator[None]:
        """One exchange; ``spent`` counts the seconds in which it is put on the stream, not those that it takes."""
        with self.counted(), self.watch.exchange(peer):
            yield

    # -- in the host's memory ------------------------------------------------------------------------------------

    def broadcast(self, value: Array) -> None:
        """See ``Collectives``."""
        self.host.broadcast(value)

    def barrier(self) -> None:
        """See ``Collectives``."""
        self.host.barrier()

    def check(self) -> None:
        """See ``Collectives``."""
        self.host.check()

    def mark(self, peer: int | None = None) -> None:
        """See ``Collectives``."""
        self.host.mark(peer)

    def blame(self) -> str:
        """See ``Collectives``."""
        return self.host.blame()

    def fail(self, message: str) -> None:
        """See ``Collectives``."""
        self.watch.end(message)

    def close(self) -> None:
        """See ``Collectives``."""
        self.watch.abort()
        self.host.close()
