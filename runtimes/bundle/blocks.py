"""Weights that are used as they lie on disk (``memory="low"``) are checked block by block, when they are first read.

Hashing a whole file would read it all, and such a bundle may be larger than the memory. Instead, after every call and
before its result goes out, the blocks that the operating system holds in memory by then (``mincore``) and that were not
checked yet are hashed: what the call has read is among them. A call that caused no page fault has read nothing new.

Not seen: a block that was read and dropped again within one call, because the memory was too small for the call. It is
checked when a later call finds it. Where there is no ``mincore``, all blocks are checked first.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import HerdError
from ...reading import open_file, read_text
from .digests import NEWEST, Algorithm, digest

BLOCK = 4 << 20
"""Bytes that are hashed together: what one read of a weight matrix brings in anyhow."""
PIECE = 256 << 10
"""Bytes that are read at once: they are in the cache when they are hashed. Mapped ones would cost page faults."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def hashes_file(data: Path, algorithm: Algorithm) -> Path:
    """Where the hashes of a weight file's blocks lie."""
    return data.with_name(f"{data.name}.{algorithm}")


def write_block_hashes(data: Path) -> None:
    """Write the hash of every block of a weight file beside it, one per line in hexadecimal."""
    blocks = range(0, data.stat().st_size, BLOCK)
    with ThreadPoolExecutor() as pool:
        lines = [f"{found}\n" for found in pool.map(lambda begin: digest(NEWEST, _pieces(data, begin)), blocks)]
    hashes_file(data, NEWEST).write_text("".join(lines), encoding="ascii")


def _pieces(path: Path, begin: int) -> Iterator[memoryview]:
    """The block of a file that begins somewhere, in one buffer that holds piece after piece."""
    buffer = memoryview(bytearray(PIECE))
    with open_file(path) as file:
        file.seek(begin)
        for _ in range(BLOCK // PIECE):
            yield buffer[: file.readinto(buffer)]  # type: ignore[attr-defined]


class BlockHashes:
    """The hashes of a weight file's blocks, which lie beside it.

    Args:
        path: the weight file.
        algorithm: of the hashes.

    Raises:
        HerdError: there are none, or not as many as blocks.
    """

    def __init__(self, path: Path, algorithm: Algorithm) -> None:
        hashes = hashes_file(path, algorithm)
        if not hashes.is_file():
            raise HerdError(f"{path} has no block hashes beside it, by which it is checked: rebuild the bundle")
        self.path, self._algorithm, self._hashes = path, algorithm, read_text(hashes).split()
        blocks = -(-path.stat().st_size // BLOCK)
        if len(self._hashes) != blocks:
            raise HerdError(f"{hashes} has {len(self._hashes)} hashes for {blocks} blocks: rebuild the bundle")

    def __len__(self) -> int:
        return len(self._hashes)

    def check(self, block: int, pieces: Iterable[bytes | memoryview]) -> None:
        """Compare a block's content with its hash.

        Raises:
            HerdError: it was altered.
        """
        found, wanted = digest(self._algorithm, pieces), self._hashes[block]
        if found != wanted:
            raise HerdError(f"{self.path} was altered: {self._algorithm} of block {block} is {found[:12]}…, the bundle "
                            f"says {wanted[:12]}…; copy or rebuild the bundle")


def check_all_blocks(files: Iterable[BlockHashes], threads: int | None) -> None:
    """Compare every block of some weight files.

    Args:
        files: their hashes.
        threads: that read, None for one per core.

    Raises:
        HerdError: a block was altered.
    """
    def check(hashes: BlockHashes, block: int) -> None:
        hashes.check(block, _pieces(hashes.path, block * BLOCK))

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        running = [pool.submit(check, hashes, block) for hashes in files for block in range(len(hashes))]
        for one in running:
            one.result()


def block_check(files: Iterable[BlockHashes]) -> Callable[[], None]:
    """What to call after every call that may have read from weight files, given by their hashes."""
    checks = [_BlockCheck(hashes) for hashes in files]
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


class _BlockCheck:
    """Checks the blocks of one file that are in memory and were not checked before."""

    def __init__(self, hashes: BlockHashes) -> None:
        self._hashes = hashes
        with open_file(hashes.path) as file:
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
            self._hashes.check(block, [os.pread(self._file, BLOCK, block * BLOCK)])
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
