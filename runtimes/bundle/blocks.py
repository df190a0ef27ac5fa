"""Weights that are used as they lie on disk (``memory="low"``) are checked block by block, when they are first read.

Hashing a whole file would read it all, and such a bundle may be larger than the memory. Instead, after every call and
before its result goes out, the blocks that the operating system holds in memory by then (``mincore``) and that were not
checked yet are hashed: what the call has read is among them. A call that caused no page fault has read nothing new.

Not seen: a block that was read and dropped again within one call, because the memory was too small for the call. It is
checked when a later call finds it. Where there is no ``mincore``, all blocks are checked first.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import weakref
from collections.abc import Callable, Iterable
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import HerdError
from ...reading import open_file, read_text

BLOCK = 4 << 20
"""Bytes that are hashed together: what one read of a weight matrix brings in anyhow."""
SUFFIX = ".sha256"

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def write_block_hashes(data: Path) -> None:
    """Write the SHA-256 of every block of a weight file beside it, one per line in hexadecimal."""
    with data.open("rb") as file:
        lines = [hashlib.sha256(block).hexdigest() + "\n" for block in iter(lambda: file.read(BLOCK), b"")]
    data.with_name(data.name + SUFFIX).write_text("".join(lines), encoding="ascii")


def block_check(files: Iterable[Path]) -> Callable[[], None]:
    """What to call after every call that may have read from weight files.

    Args:
        files: weight files with their hashes beside them.

    Raises:
        HerdError: a file has no hashes beside it, or not as many as blocks.
    """
    checks = [_BlockCheck(path) for path in files]
    faults = _page_faults()
    last: int | None = None

    def check() -> None:
        nonlocal last
        count = faults() if faults else None
        if count is None or count != last:
            last = count
            for one in checks:
                one()

    return check


class BlockHashes:
    """The hashes of a weight file's blocks, which lie beside it.

    Args:
        path: the weight file.

    Raises:
        HerdError: there are none, or not as many as blocks.
    """

    def __init__(self, path: Path) -> None:
        hashes = path.with_name(path.name + SUFFIX)
        if not hashes.is_file():
            raise HerdError(f"{path} has no block hashes beside it, by which it is checked: rebuild the bundle")
        self._path, self._hashes = path, read_text(hashes).split()
        blocks = -(-path.stat().st_size // BLOCK)
        if len(self._hashes) != blocks:
            raise HerdError(f"{hashes} has {len(self._hashes)} hashes for {blocks} blocks: rebuild the bundle")

    def __len__(self) -> int:
        return len(self._hashes)

    def check(self, block: int, content: bytes | memoryview) -> None:
        """Compare a block's content with its hash.

        Raises:
            HerdError: it was altered.
        """
        found, wanted = hashlib.sha256(content).hexdigest(), self._hashes[block]
        if found != wanted:
            raise HerdError(f"{self._path} was altered: SHA-256 of block {block} is {found[:12]}…, the bundle says "
                            f"{wanted[:12]}…; copy or rebuild the bundle")


class _BlockCheck:
    """Checks the blocks of one file that are in memory and were not checked before."""

    def __init__(self, path: Path) -> None:
        self._hashes = BlockHashes(path)
        with open_file(path) as file:
            self._file = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._file)
            # Mapped to ask about its pages; blocks are read, since mapped pages would count as this process's memory.
            self._pages: Bytes = np.frombuffer(mmap.mmap(self._file, 0, access=mmap.ACCESS_READ), np.uint8)
        self._unchecked = np.ones(len(self._hashes), bool)

    def __call__(self) -> None:
        """Check.

        Raises:
            HerdError: a block was altered.
        """
        for block in map(int, np.flatnonzero(self._unchecked & self._resident())):
            self._hashes.check(block, os.pread(self._file, BLOCK, block * BLOCK))
            self._unchecked[block] = False

    def _resident(self) -> Flags:
        """Which of the unchecked blocks have a page in memory; the others count as not."""
        resident = np.zeros(len(self._unchecked), bool)
        for unchecked, run in groupby(range(len(resident)), key=lambda block: bool(self._unchecked[block])):
            if unchecked:
                blocks = list(run)
                resident[blocks] = self._resident_in(blocks[0], blocks[-1] + 1)
        return resident

    def _resident_in(self, first: int, last: int) -> Flags:
        begin, end = first * BLOCK, min(last * BLOCK, len(self._pages))
        pages = np.ones((last - first) * (BLOCK // mmap.PAGESIZE), np.uint8)
        mincore = getattr(ctypes.CDLL(None), "mincore", None)
        if mincore is not None:
            pages[-(-(end - begin) // mmap.PAGESIZE) :] = 0
            mincore(ctypes.c_void_p(self._pages.ctypes.data + begin), ctypes.c_size_t(end - begin),
                    ctypes.c_void_p(pages.ctypes.data))
        return np.bitwise_or.reduce(pages.reshape(last - first, -1), axis=1) % 2 == 1


def _page_faults() -> Callable[[], int] | None:
    """A counter of this process's page faults, None where the system has none."""
    try:
        resource = import_module("resource")
    except ImportError:
        return None

    def count() -> int:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return int(usage.ru_minflt + usage.ru_majflt)

    return count
