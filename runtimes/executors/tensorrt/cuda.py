"""Device memory and copies through ``cuda.bindings.runtime`` (package ``cuda-bindings``). Not run on hardware.

Only the calls that are needed, each checked: CUDA's functions return their error first.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from ....errors import HerdError

Array = np.ndarray[Any, Any]


class Cuda:
    """The CUDA runtime on one device, with one stream on which everything happens in order.

    Args:
        device: index of the GPU.

    Raises:
        HerdError: no ``cuda-bindings``, no driver or no such GPU.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise HerdError("cuda-bindings is not installed: pip install 'herdgraph[tensorrt-rtx]'") from error
        self.runtime, self.device = runtime, device
        if device and device >= (count := self.call("cudaGetDeviceCount")):
            raise HerdError(f"GPU {device} was asked for, this machine has {count}: start no more ranks than GPUs")
        self.activate()
        attributes = runtime.cudaDeviceAttr
        parts = (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor)
        self.compute_capability = "".join(str(self.call("cudaDeviceGetAttribute", part, device)) for part in parts)
        self.stream = self.call("cudaStreamCreate")

    @property
    def handle(self) -> int:
        """The stream as a number; see ``Stream`` of ``distributed/watch.py``."""
        return int(self.stream)

    def activate(self) -> None:
        """Let the calling thread work on this GPU."""
        self.call("cudaSetDevice", self.device)

    def is_done(self) -> bool:
        """Whether all that was put on the stream has happened; does not wait."""
        error, *_ = self.runtime.cudaStreamQuery(self.stream)
        if error == self.runtime.cudaError_t.cudaErrorNotReady:
            return False
        self._check("cudaStreamQuery", error)
        return True

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime; its result, or None.

        Raises:
            HerdError: CUDA's own words.
        """
        error, *results = getattr(self.runtime, name)(*arguments)
        self._check(name, error)
        return results[0] if results else None

    def _check(self, name: str, error: Any) -> None:
        if error != self.runtime.cudaError_t.cudaSuccess:
            text = self.runtime.cudaGetErrorString(error)[1].decode()
            raise HerdError(f"{name} failed: {text}")

    def allocate(self, size: int) -> Allocation:
        """Device memory, freed when nothing refers to it any more; at least one byte, so that it has an address."""
        pointer = int(self.call("cudaMalloc", max(1, size)))
        allocation = Allocation(pointer, size)
        weakref.finalize(allocation, self.runtime.cudaFree, pointer)
        return allocation

    def clear(self, pointer: int, size: int) -> None:
        """Fill with zero bytes."""
        self.call("cudaMemsetAsync", pointer, 0, size, self.stream)

    def upload(self, array: Array, pointer: int) -> None:
        """Copy a contiguous host array to the device."""
        if array.nbytes:
            kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
            self.call("cudaMemcpyAsync", pointer, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, pointer: int, array: Array) -> None:
        """Copy from the device to a contiguous host array, and wait for everything that was asked for before."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, pointer, array.nbytes, kind, self.stream)
        self.call("cudaStreamSynchronize", self.stream)

    def copy_rows(self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, rows: int) -> None:
        """Copy ``rows`` runs of ``width`` bytes, each ``pitch`` bytes after the one before."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self.stream)


@dataclass(eq=False)
class Allocation:
    """A block of device memory.

    Attributes:
        pointer: its address.
        bytes: its size.
    """

    pointer: int
    bytes: int


@dataclass(frozen=True, eq=False)
class DeviceBuffer:
    """Keys or values [batch, kv_heads, slots, head_dim] in device memory.

    Attributes:
        pointer: address of the first element.
        shape: as above.
        itemsize: bytes of an element.
        owner: keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    itemsize: int
    owner: Allocation = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size."""
        return prod(self.shape) * self.itemsize

    @property
    def pitch(self) -> int:
        """Bytes from one head's slots to the next head's."""
        return self.shape[2] * self.shape[3] * self.itemsize


@dataclass(frozen=True)
class DeviceMemory:
    """Cache buffers on the device; see ``CacheMemory``.

    Attributes:
        cuda: the device.
        itemsize: bytes of an element: 2 for bfloat16, 1 for FP8.
    """

    cuda: Cuda
    itemsize: int

    def zeros(self, shape: tuple[int, ...]) -> DeviceBuffer:
        """See ``CacheMemory``."""
        size = prod(shape) * self.itemsize
        allocation = self.cuda.allocate(size)
        self.cuda.clear(allocation.pointer, size)
        return DeviceBuffer(allocation.pointer, shape, self.itemsize, allocation)

    def row(self, buffer: DeviceBuffer, index: int) -> DeviceBuffer:
        """See ``CacheMemory``."""
        shape = (1, *buffer.shape[1:])
        pointer = buffer.pointer + index * prod(shape) * self.itemsize
        return DeviceBuffer(pointer, shape, self.itemsize, buffer.owner)

    def copy(self, source: DeviceBuffer, target: DeviceBuffer) -> None:
        """See ``CacheMemory``."""
        heads = source.shape[0] * source.shape[1]
        self.cuda.copy_rows(source.pointer, source.pitch, target.pointer, target.pitch, source.pitch, heads)

    def append(self, new: int, tokens: int, cache: DeviceBuffer, first_slots: list[int]) -> None:
        """Write new keys or values [B, G, T, K] to T slots of a cache, from each sequence's first slot."""
        _, groups, _, width = cache.shape
        run = tokens * width * self.itemsize
        for index, slot in enumerate(first_slots):
            row = self.row(cache, index)
            target = row.pointer + slot * width * self.itemsize
            self.cuda.copy_rows(new + index * groups * run, run, target, row.pitch, run, groups)
