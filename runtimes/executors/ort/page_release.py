"""Giving back the pages of weight files while a session loads.

ONNX Runtime maps a data file and packs most weights into buffers of its own. The mapped pages it has read stay in this
process's resident memory for no use: a model would need its size twice. They are clean copies of the file, so dropping
them loses nothing; a weight that is used as it is mapped (an embedding) is read again from the page cache.

Linux only: elsewhere nothing happens, and the operating system drops the pages when it needs them.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_INTERVAL = 0.01
_ALLOWED = 128 << 20
"""Bytes of pages that may stay before they are dropped: looking for them takes longer than counting them."""
_MADV_DONTNEED = 4
_MAPS = Path("/proc/self/maps")


@contextmanager
def drop_page_cache_during_load(*files: Path) -> Iterator[None]:
    """Drop the resident pages of mapped files whenever many have come, until the block ends, and once more then."""
    if not sys.platform.startswith("linux") or not _MAPS.exists():
        yield
        return
    names, done, before = {str(file.resolve()) for file in files}, threading.Event(), _resident_file_bytes()

    def repeat() -> None:
        while not done.wait(_INTERVAL):
            if _resident_file_bytes() > before + _ALLOWED:
                release(names)

    thread = threading.Thread(target=repeat, daemon=True, name="herdgraph-pages")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        release(names)


def _resident_file_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[2]) * mmap.PAGESIZE


def release(names: set[str]) -> None:
    """Drop the resident pages of these files' mappings. Their content is the file's: nobody writes to weights."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in _MAPS.read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if fields[-1] in names:
            begin, end = (int(part, 16) for part in fields[0].split("-"))
            libc.madvise(begin, end - begin, _MADV_DONTNEED)
