"""Where keys and values live: the host's memory for ONNX Runtime, the GPU's for TensorRT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Buffer = Any
"""Keys or values [batch, kv_heads, slots, head_dim]; has ``shape`` and ``nbytes``. A numpy array in host memory."""


class CacheMemory(Protocol):
    """Makes and moves buffers."""

    def zeros(self, shape: tuple[int, ...]) -> Buffer:
        """A new buffer. Zeros, not garbage: a masked slot still meets a weight of 0, and 0 · NaN would be NaN."""

    def row(self, buffer: Buffer, index: int) -> Buffer:
        """Sequence ``index`` of a buffer, [1, kv_heads, slots, head_dim], in the same memory."""

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Write a buffer to the first slots of another that has as many or more."""


@dataclass(frozen=True)
class HostMemory:
    """Numpy arrays.

    Attributes:
        dtype: of the elements.
    """

    dtype: type[np.generic] = np.float32

    def zeros(self, shape: tuple[int, ...]) -> Buffer:
        """See ``CacheMemory``."""
        return np.zeros(shape, self.dtype)

    def row(self, buffer: Buffer, index: int) -> Buffer:
        """See ``CacheMemory``."""
        return buffer[index : index + 1]

    def copy(self, source: Buffer, target: Buffer) -> None:
        """See ``CacheMemory``."""
        target[:, :, : source.shape[2]] = source
