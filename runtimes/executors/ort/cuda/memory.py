"""Cache blocks in a GPU's memory, and how much of it they may take."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .....errors import HerdError
from .....files import size
from .....model.config import TextConfig
from ...options import ExecutorOptions
from .stream import RUNTIME
from .views import Place

BLOCK_TOKENS = 128
"""Tokens of a cache block: the fewest that Flash attention reads where they lie, with heads of 128."""
SHARE = 0.9
"""Of the memory that is free when an engine is loaded: what the engine takes unless somebody says otherwise."""
CALL_TOKENS = 2048
"""Most tokens of a prompt in one call; memory for so many is left beside keys and values."""
_WORKSPACE = 512 << 20
"""Bytes that cuBLAS, mixtures and recorded graphs may take for themselves."""

ELEMENTS = {"float": (1, 4), "int8": (3, 1), "bfloat16": (16, 2), "float8e4m3fn": (17, 1)}
"""ONNX's number and the bytes of an element of keys and values, by onnxruntime's name."""


@dataclass(frozen=True)
class DeviceBlocks:
    """Blocks [tokens, kv_heads, head_dim] on a device; see ``BlockMemory``.

    Attributes:
        place: the device.
        text: the decoder.
        element: of keys and values, by onnxruntime's name.
    """

    place: Place
    text: TextConfig
    element: str
    block_tokens: int = BLOCK_TOKENS
    is_lazy: bool = False

    @property
    def block_bytes(self) -> int:
        """Bytes of one layer's keys in a block, and as many of its values."""
        return self.block_tokens * self.text.num_kv_heads * self.text.head_dim * ELEMENTS[self.element][1]

    def reserve(self, blocks: int, block_bytes: int) -> Any:
        """See ``BlockMemory``: a value [blocks, tokens, kv_heads, head_dim] of zeros.

        Zeros, not garbage: a slot that attention leaves out meets a weight of 0, and 0 · NaN would be NaN.
        """
        shape = (blocks, self.block_tokens, self.text.num_kv_heads, self.text.head_dim)
        room, done = self.place.empty(shape, ELEMENTS[self.element][0]), 1
        self.place.part(room, 0, [block_bytes]).update_inplace(np.zeros(block_bytes, np.uint8))
        while done < blocks:
            count = min(done, blocks - done)
            self._move(room, 0, done * block_bytes, count * block_bytes)
            done += count
        return room

    def copy(self, rooms: Iterable[Any], source: int, target: int) -> None:
        """See ``BlockMemory``; nothing passes through the host."""
        count = self.block_bytes
        for room in rooms:
            self._move(room, source * count, target * count, count)

    def _move(self, room: Any, source: int, target: int, count: int) -> None:
        self.place.part(room, target, [count]).update_inplace(self.place.part(room, source, [count]))


def free_bytes(place: Place) -> int:
    """Free memory of a GPU, which the CUDA runtime that onnxruntime has loaded tells."""
    runtime, free, total = ctypes.CDLL(RUNTIME), ctypes.c_size_t(), ctypes.c_size_t()
    for status in (runtime.cudaSetDevice(place.index),
                   runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))):
        if status:
            raise HerdError(f"{place.kind}:{place.index} does not tell how much memory it has (CUDA error {status}): "
                            "run `herdgraph doctor`")
    return free.value


def memory_limit(place: Place, free: int, options: ExecutorOptions) -> int:
    """Bytes that an engine may take.

    Args:
        place: the GPU.
        free: bytes there, before anything is loaded.
        options: what was asked for.

    Raises:
        HerdError: more than is free was asked for.
    """
    limit = int(free * SHARE) if options.gpu_memory is None else options.gpu_memory
    if limit > free:
        raise HerdError(f"gpu_memory is {size(limit)}, {place.kind}:{place.index} has {size(free)} free: give less, or "
                        "end what uses the GPU")
    return limit


def call_bytes(text: TextConfig) -> int:
    """About what a call over ``CALL_TOKENS`` takes beside weights, keys and values: activations, and workspaces."""
    widest = max(text.expert_size, text.dense_size)
    heads = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    return _WORKSPACE + CALL_TOKENS * 2 * (8 * text.hidden_size + 2 * heads + 6 * widest)


def cache_budget(limit: int, used: int, calls: int, wanted: int | None) -> int:
    """Bytes for keys and values.

    Args:
        limit: that the engine may use of the GPU.
        used: by weights, already.
        calls: that calls need for themselves.
        wanted: ``cache_bytes``, None for all that is left.

    Raises:
        HerdError: nothing is left, or less than was asked for.
    """
    left = limit - used - calls
    if left <= 0:
        raise HerdError(f"gpu_memory is {size(limit)}; weights take {size(used)} of it and calls {size(calls)}, which "
                        "leaves nothing for keys and values: give more, or build with a smaller recipe")
    if wanted is not None and wanted > left:
        raise HerdError(f"cache_bytes is {size(wanted)}, {size(left)} of gpu_memory are left beside weights and calls: "
                        "give less, or more gpu_memory")
    return left if wanted is None else wanted
