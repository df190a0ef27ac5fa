"""Device memory and a stream through ctypes: what checks without a session need of CUDA."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_size_t, c_void_p
from typing import Any

import numpy as np

from .graphs import Array

_TO_DEVICE, _TO_HOST = 1, 2


class Cudart:
    """The CUDA runtime on the first GPU, with a stream."""

    def __init__(self) -> None:
        self._library = _load("libcudart.so.13")
        stream = c_void_p()
        self.call("cudaSetDevice", 0)
        self.call("cudaStreamCreate", byref(stream))
        self.stream = int(stream.value or 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; raises when it fails."""
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed: {status}")

    def upload(self, array: Array) -> int:
        """The address of new memory with an array's bytes."""
        pointer = c_void_p()
        self.call("cudaMalloc", byref(pointer), c_size_t(array.nbytes))
        data = np.ascontiguousarray(array)
        self.call("cudaMemcpy", pointer, c_void_p(data.ctypes.data), c_size_t(array.nbytes), _TO_DEVICE)
        return int(pointer.value or 0)

    def download(self, pointer: int, like: Array) -> Array:
        """An array's bytes, after everything that was put on the stream."""
        self.synchronize()
        found = np.empty_like(like)
        self.call("cudaMemcpy", c_void_p(found.ctypes.data), c_void_p(pointer), c_size_t(found.nbytes), _TO_HOST)
        return found

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.call("cudaStreamSynchronize", c_void_p(self.stream))


def _load(name: str) -> Any:
    """A library: the one that is loaded already, as on a hollow device, the system's, or that of a pip package."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        from herdgraph.runtimes.machine.probe_libraries import find

        return ctypes.CDLL(find(name) or name)
