"""A stream of a GPU on which ONNX Runtime and NCCL work in turns; through the CUDA runtime that onnxruntime loads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

from .....errors import HerdError
from .views import Place

RUNTIME = "libcudart.so.13"
_NOT_READY = 600
"""``cudaErrorNotReady``."""
_THREAD_LOCAL = 1
"""``cudaStreamCaptureModeThreadLocal``: other threads, such as NCCL's own, may do what a recorded one must not."""


class CudaStream:
    """See the module, and ``Stream`` of ``distributed/watch.py``.

    Copies that are not put on a stream, as ONNX Runtime's Python makes them, wait for it and it for them.

    Args:
        place: the GPU.

    Attributes:
        handle: CUDA's ``cudaStream_t`` as a number.

    Raises:
        HerdError: the GPU takes no stream.
    """

    def __init__(self, place: Place) -> None:
        self._runtime, self._index = ctypes.CDLL(RUNTIME), place.index
        made = ctypes.c_void_p()
        self.activate()
        self._call("cudaStreamCreate", ctypes.byref(made))
        self.handle = made.value or 0

    def activate(self) -> None:
        """Make its GPU that of the calling thread."""
        self._call("cudaSetDevice", self._index)

    def is_done(self) -> bool:
        """Whether all that was put on it has happened; does not wait."""
        return self._call("cudaStreamQuery", ctypes.c_void_p(self.handle), allowed=_NOT_READY) == 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what work puts on the stream as a CUDA graph, which nothing runs meanwhile.

        Args:
            work: allocates nothing and waits for nothing; memory that it uses stays where it is.

        Returns:
            Puts all of it on the stream, by one launch.
        """
        recorded, executable, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(self.handle)
        self._call("cudaStreamBeginCapture", stream, _THREAD_LOCAL)
        try:
            work()
        except BaseException:
            self._runtime.cudaStreamEndCapture(stream, ctypes.byref(recorded))
            raise
        self._call("cudaStreamEndCapture", stream, ctypes.byref(recorded))
        self._call("cudaGraphInstantiate", ctypes.byref(executable), recorded, ctypes.c_ulonglong(0))
        self._call("cudaGraphDestroy", recorded)
        return partial(self._launch, executable)

    def _launch(self, executable: ctypes.c_void_p) -> None:
        self._call("cudaGraphLaunch", executable, ctypes.c_void_p(self.handle))

    def _call(self, name: str, *arguments: Any, allowed: int = 0) -> int:
        status = int(getattr(self._runtime, name)(*arguments))
        if status not in (0, allowed):
            raise HerdError(f"{name} failed on cuda:{self._index} with CUDA error {status}: see what `herdgraph "
                            "doctor` says of this GPU")
        return status
