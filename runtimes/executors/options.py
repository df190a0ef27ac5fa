"""How an executor loads a bundle's graphs."""

from __future__ import annotations

from dataclasses import dataclass


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
