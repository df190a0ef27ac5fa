"""Sees that the other ranks are there while something on the GPU needs them. Not run on hardware.

    call       begin -- AllReduce -- plan -- Send -- ... -- wait: the stream is done, or RankError "rank 1 has ended"
    thread     every 50 ms: NCCL's errors, the host's transport, the clock -> ncclCommAbort

A kernel of NCCL whose partner is gone never ends by itself, and a host that launches behind it blocks sooner or later,
wherever it is: in NCCL, in ONNX Runtime, in TensorRT. So a thread looks on from the beginning of a call to its end.
When a rank has failed, ended, or kept the others waiting for longer than the timeout, it tells all ranks through the
host's transport and aborts this rank's communicators; what blocks comes back then, and the call ends with the reason.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

from .collectives import Collectives, RankError
from .libnccl import Communicator, NcclError

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


class Watch:
    """See the module.

    Args:
        host: the ranks' exchanges in the host's memory.
        stream: on which everything happens.

    Attributes:
        communicators: those that are aborted.
    """

    def __init__(self, host: Collectives, stream: Stream) -> None:
        self.host, self.stream, self.communicators = host, stream, list[Communicator]()
        self._reason = ""
        self._since: float | None = None
        """When the last exchange was begun, None while nothing is under way."""
        self._closed = threading.Event()
        threading.Thread(target=self._look_on, daemon=True).start()

    # -- the call's own thread -----------------------------------------------------------------------------------

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call of the model: exchanges, and what runs between them or has them inside, until all is done.

        Raises:
            RankError: another rank failed, ended or stalls; what failed here because of that is told so, too.
        """
        self.begin()
        try:
            yield
            self.wait()
        except Exception as error:
            if reason := self._reason or self._trouble(time.monotonic()):
                self.end(reason)
                raise RankError(reason) from error
            raise

    @contextmanager
    def exchange(self, peer: int | None = None) -> Iterator[None]:
        """Put an exchange on the stream.

        Args:
            peer: the rank that it is with, None for the stage.

        Raises:
            RankError: another rank is not there, or NCCL fails here.
        """
        self.begin(peer)
        try:
            yield
        except NcclError as error:
            self.end(f"rank {self.host.rank}: {error}")
        self._raise_if_ended()

    def begin(self, peer: int | None = None) -> None:
        """From here until ``wait`` returns something on the stream needs others: a rank, or those of the stage.

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

    def patiently(self, work: Callable[[], Result]) -> Result:
        """Run what waits for all ranks and cannot be stopped, in a thread that may be left behind.

        Raises:
            RankError: another rank failed, ended or does not come.
        """
        future: Future[Result] = Future()
        threading.Thread(target=self._run, args=(work, future), daemon=True).start()
        self.host.mark()
        began = time.monotonic()
        while not wait_for([future], _HEARTBEAT).done:
            if reason := self._trouble(began):
                self.end(reason)
                raise RankError(reason)
        return future.result()

    def _run(self, work: Callable[[], Result], future: Future[Result]) -> None:
        try:
            self.stream.activate()
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    def _raise_if_ended(self) -> None:
        if self._reason:
            raise RankError(self._reason)

    # -- the thread that looks on --------------------------------------------------------------------------------

    def _look_on(self) -> None:
        while not self._closed.wait(_HEARTBEAT):
            since = self._since
            if since is not None and (reason := self._trouble(since)):
                self.end(reason)

    def _trouble(self, since: float) -> str:
        """Why what was begun then will not come to its end; empty as long as it may."""
        rank, timeout = self.host.rank, self.host.timeout
        try:
            self.host.check()
            for communicator in self.communicators:
                if error := communicator.error():
                    return f"rank {rank} has lost another rank: {error}"
        except (RankError, NcclError) as error:
            return str(error)
        late = time.monotonic() - since - timeout
        if late > 0 and (named := self.host.blame()):
            return named
        if late < _DOUBT:
            return ""
        return (f"rank {rank} has waited for {timeout:g} s in an exchange that all have begun: see what NCCL does with "
                "NCCL_DEBUG=INFO, or give a longer timeout if it is only slow")

    # -- the end -------------------------------------------------------------------------------------------------

    def end(self, reason: str) -> None:
        """Tell all ranks, and abort; the reason is there before a call that blocks comes back."""
        self._reason = self._reason or reason
        self.host.fail(self._reason)
        self.abort()

    def abort(self) -> None:
        """Let go of the communicators, whatever they are at; needs nobody else."""
        self._closed.set()
        for communicator in self.communicators:
            with suppress(NcclError):  # it ends anyway
                communicator.abort()
