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
    """

    threads: int | None = None
    prepack: bool = True
    verify: bool = False

    @property
    def check_blocks(self) -> bool:
        """Whether blocks of mapped weights are compared with their hashes after every call."""
        return self.verify and not self.prepack

    @classmethod
    def of(cls, threads: int | None, memory: Memory, *, verify: bool) -> ExecutorOptions:
        """Options from what applications give; arguments as in ``Engine.load``.

        Raises:
            HerdError: a value is impossible.
        """
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise HerdError(f"threads is {threads}, it must be within 1 and {MOST_THREADS}")
        if memory not in get_args(Memory):
            raise HerdError(f"memory is {memory!r}, it must be one of {', '.join(get_args(Memory))}")
        return cls(threads, memory == "fast", verify=verify)
