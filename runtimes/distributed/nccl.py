"""Exchanges between GPUs through NCCL, one process per GPU. Not run on hardware: tested on a hollow NCCL.

Hidden states never leave the GPUs: sums, joined rows and what stages hand on are put on the stream that the partitions
run on, and nobody waits. Commands, and logits on their way to rank 0, are in the host's memory and go through the
host's transport, as without GPUs. It also carries NCCL's unique ids when the ranks meet, and tells of failures:

    call       watch -- AllReduce -- ... -- wait: the stream is done, or RankError "rank 1 has ended"
    thread     every 50 ms: NCCL's errors, the host's transport, the clock -> ncclCommAbort

A kernel of NCCL whose partner is gone never ends by itself, and a host that launches behind it blocks sooner or later,
wherever it is. So a thread looks on from the first exchange until ``wait`` returns, and aborts the communicators when a
rank has failed, ended, or kept the others waiting for longer than the timeout.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from math import prod
from typing import Any, Protocol, TypeVar

import numpy as np

from ...model.config.shard_plan import ShardPlan
from ..executors.device_array import DeviceArray
from .collectives import Array, Collectives, RankError, Values
from .libnccl import UNIQUE_ID_BYTES, Communicator, Library, NcclError, load, told

_HEARTBEAT = 0.05
"""Seconds between two looks at the others."""
_AWAKE = 2e-3
"""Seconds that ``wait`` looks at the stream without a pause; a token takes about as long."""
_PAUSE = 1e-4
_DOUBT = 1.0
"""Seconds that a rank waits after the timeout for another one to say who is behind, if it does not see it itself."""

Result = TypeVar("Result")


class Stream(Protocol):
    """A CUDA stream of this rank's GPU, on which everything happens in order."""

    @property
    def handle(self) -> int:
        """CUDA's ``cudaStream_t`` as a number."""

    def activate(self) -> None:
        """Make its GPU that of the calling thread."""

    def is_done(self) -> bool:
        """Whether all that was put on it has happened."""


class Nccl(Collectives):
    """See the module.

    Args:
        host: the ranks' exchanges in the host's memory.
        plan: arranges the ranks in stages.
        stream: on which exchanges happen; ONNX Runtime's ``user_compute_stream``, or that of TensorRT's plans.

    Raises:
        HerdError: NCCL is missing, too old, or not the same on all ranks.
        RankError: another rank does not come.
    """

    def __init__(self, host: Collectives, plan: ShardPlan, stream: Stream) -> None:
        super().__init__(host.rank, host.world, host.group, host.timeout)
        self.host, self.stream = host, stream
        self._place = host.rank - host.group.start
        self._reason = ""
        self._since: float | None = None
        """When the last exchange began, None while nothing is under way."""
        self._closed, self._communicators = threading.Event(), list[Communicator]()
        # Algorithms that add each element up in one place: all ranks see the same bits.
        os.environ.setdefault("NCCL_ALGO", "Ring,Tree")
        library = load()
        self._check_same(library)
        several = plan.pipeline > 1
        ids = self._unique_ids(library, plan.pipeline + several)
        self._stage = self._meet(library, ids[plan.stage_of(self.rank)], len(self.group), self._place)
        self._everybody = self._meet(library, ids[-1], self.world, self.rank) if several else self._stage
        threading.Thread(target=self._look_on, daemon=True).start()

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

    def _meet(self, library: Library, unique_id: bytes, size: int, place: int) -> Communicator:
        communicator = self.patiently(lambda: library.communicator(unique_id, size, place))
        self._communicators.append(communicator)
        return communicator

    def patiently(self, work: Callable[[], Result]) -> Result:
        """Run what waits for all ranks of the stage and cannot be stopped, in a thread that may be left behind.

        Raises:
            RankError: another rank failed, ended or does not come.
        """
        future: Future[Result] = Future()
        threading.Thread(target=self._run, args=(work, future), daemon=True).start()
        self.host.mark()
        began = time.monotonic()
        while not wait_for([future], _HEARTBEAT).done:
            if reason := self._trouble(began):
                self._end(reason)
                raise RankError(reason)
        return future.result()

    def _run(self, work: Callable[[], Result], future: Future[Result]) -> None:
        try:
            self.stream.activate()
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    def capsule(self) -> Any:
        """The stage's communicator as TensorRT takes it."""
        return self._stage.capsule()

    # -- exchanges -----------------------------------------------------------------------------------------------

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

    def broadcast(self, value: Array) -> None:
        """See ``Collectives``: in the host's memory."""
        self.host.broadcast(value)

    def barrier(self) -> None:
        """See ``Collectives``."""
        self.host.barrier()

    @contextmanager
    def _exchange(self, peer: int | None = None) -> Iterator[None]:
        """Put an exchange on the stream; ``spent`` counts the seconds in which it is put there, not those it takes."""
        self.watch(peer)
        try:
            with self.counted():
                yield
        except NcclError as error:
            self._end(self._reason or f"rank {self.rank}: {error}")
        self._raise_if_ended()

    # -- watching ------------------------------------------------------------------------------------------------

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call of the model: exchanges, and what runs between them or has them inside, until all is done.

        Raises:
            RankError: another rank failed, ended or stalls; what failed here because of that is told so, too.
        """
        self.watch()
        try:
            yield
            self.wait()
        except Exception as error:
            if reason := self._reason or self._trouble(time.monotonic()):
                self._end(reason)
                raise RankError(reason) from error
            raise

    def watch(self, peer: int | None = None) -> None:
        """From here until ``wait`` returns, see that the others are there: something on the stream needs them.

        Args:
            peer: the rank that it needs, None for those of the stage.

        Raises:
            RankError: they were not there.
        """
        self._raise_if_ended()
        self._since = time.monotonic()
        self.host.mark(peer)

    def wait(self) -> None:
        """Until all that was put on the stream has happened.

        Raises:
            RankError: another rank failed, ended or stalls.
        """
        self._raise_if_ended()
        began = self._since = time.monotonic()
        while not self.stream.is_done():
            self._raise_if_ended()
            if time.monotonic() - began > _AWAKE:
                time.sleep(_PAUSE)
        self._since = None
        self._raise_if_ended()  # what was aborted is done, too

    def _look_on(self) -> None:
        """In a thread: end what is under way when it cannot come to its end."""
        while not self._closed.wait(_HEARTBEAT):
            since = self._since
            if since is not None and (reason := self._trouble(since)):
                self._end(reason)
                return

    def _trouble(self, since: float) -> str:
        """Why what began then will not come to its end; empty as long as it may."""
        try:
            self.host.check()
            for communicator in self._communicators:
                if error := communicator.error():
                    return f"rank {self.rank} has lost another rank: {error}"
        except (RankError, NcclError) as error:
            return str(error)
        waited = time.monotonic() - since - self.timeout
        if waited > 0 and (named := self.host.blame()):
            return named
        if waited < _DOUBT:
            return ""
        return (f"rank {self.rank} has waited for {self.timeout:g} s in an exchange that all have begun: see what NCCL "
                "does with NCCL_DEBUG=INFO, or give a longer timeout if it is only slow")

    def _end(self, reason: str) -> None:
        """Tell the others, and abort; the reason is there before a call that blocks comes back."""
        self._reason = self._reason or reason
        self.host.fail(self._reason)
        self.abort()

    def abort(self) -> None:
        """Let go of the communicators, whatever they are at; needs nobody else."""
        self._closed.set()
        for communicator in self._communicators:
            with suppress(NcclError):  # it ends anyway
                communicator.abort()

    def _raise_if_ended(self) -> None:
        if self._reason:
            raise RankError(self._reason)

    # -- failing and leaving -------------------------------------------------------------------------------------

    def check(self) -> None:
        """See ``Collectives``."""
        self._raise_if_ended()
        self.host.check()

    def mark(self, peer: int | None = None) -> None:
        """See ``Collectives``."""
        self.host.mark(peer)

    def blame(self) -> str:
        """See ``Collectives``."""
        return self.host.blame()

    def fail(self, message: str) -> None:
        """See ``Collectives``."""
        self._end(message)

    def close(self) -> None:
        """See ``Collectives``."""
        self.abort()
        self.host.close()
