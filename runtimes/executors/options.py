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
        check_blocks: compare every block of the weights with its hash before a result that read it goes out.
    """

    threads: int | None = None
    prepack: bool = True
    check_blocks: bool = False

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
        return cls(threads, memory == "fast", check_blocks=verify and memory == "low")
