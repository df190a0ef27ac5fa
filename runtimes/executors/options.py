"""How an executor loads a bundle's graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import HerdError

MOST_THREADS = 1024
"""More cores than a machine has; ONNX Runtime would start as many threads as it is told."""

Memory = Literal["fast", "low"]
"""``fast``: weights packed for speed; ``low``: weights used as they are mapped. See ``Engine.load``."""


@dataclass(frozen=True)
class ExecutorOptions:
    """How an executor loads a bundle's graphs.

    Attributes:
        threads: threads of one operator, None for one per core.
        prepack: copy weights into the layout that is fastest; otherwise they are used as they are mapped from the file.
        verify: compare weights with their hashes, packed ones while they are read, mapped ones (``prepack`` false)
            before a result that read them goes out.
        cache_bytes: that keys and values of all sequences may use, where they lie in shared blocks; None for half of
            the free memory.
        device: of bundles for a GPU, which one, such as ``cuda:0``.
        gpu_memory: of them, bytes that an engine may take there, None for nine tenths of what is free.
    """

    threads: int | None = None
    prepack: bool = True
    verify: bool = False
    cache_bytes: int | None = None
    device: str | None = None
    gpu_memory: int | None = None

    @property
    def check_blocks(self) -> bool:
        """Whether blocks of mapped weights are compared with their hashes after every call."""
        return self.verify and not self.prepack

    @classmethod
    def of(
        cls, threads: int | None, memory: Memory, *, verify: bool, cache_bytes: int | None = None,
        device: str | None = None, gpu_memory: int | None = None,
    ) -> ExecutorOptions:
        """Options from what applications give; arguments as in ``Engine.load``.

        Raises:
            HerdError: a value is impossible.
        """
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise HerdError(f"threads is {threads}, it must be within 1 and {MOST_THREADS}")
        if memory not in get_args(Memory):
            raise HerdError(f"memory is {memory!r}, it must be one of {', '.join(get_args(Memory))}")
        for name, count in (("cache_bytes", cache_bytes), ("gpu_memory", gpu_memory)):
            if count is not None and count < 1:
                raise HerdError(f"{name} is {count}, it must be above 0")
        return cls(threads, memory == "fast", verify, cache_bytes, device, gpu_memory)
