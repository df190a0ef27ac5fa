"""Packed weights: mapped as they are, or read into memory of our own.

A graph of our own operators holds its weights as they are used, so nothing is made of them while it loads: ONNX
Runtime maps the file. Where the file system keeps files in large pages (ext4 and XFS of recent kernels) that is as fast
as memory gets. Elsewhere a processor spends up to a third of its time finding small pages; then, with
``memory="fast"``, the file is read into huge pages of our own, which override the graph's initializers. Every block is
compared with its hash on the way.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import HerdError
from ....reading import open_file, read_bytes
from ...bundle.blocks import BLOCK, BlockHashes
from ...bundle.manifest import Bundle
from ..options import ExecutorOptions
from .session import GRAPH_BYTES, Values, ort_value

KEY = "herdgraph.weights"
"""Where a graph says which initializer lies where in the file beside it: a JSON object of offset and size by name."""
_HUGE_PAGE = 2 << 20
_TRIED = 64 << 20
"""Bytes of a file that are mapped to see what pages they lie in."""
_SMAPS = Path("/proc/self/smaps")
_PRIVATE: Any = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""Memory that may be shared, which is what Python asks for otherwise, gets no huge pages."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def is_packed(graph: Path) -> bool:
    """Whether a graph holds its weights as our own operators use them."""
    return graph.is_file() and KEY.encode() in read_bytes(graph, most=GRAPH_BYTES)


def checked_by_block(bundle: Bundle, *, prepack: bool) -> set[str]:
    """Weight files that are compared with their hashes block by block, not as a whole before they are used."""
    def graphs(name: str) -> list[Path]:
        path = bundle.directory / name
        return [path.with_suffix(".onnx"), path.with_suffix(".00.onnx")]

    return {name for name in bundle.weight_files if not prepack or any(map(is_packed, graphs(name)))}


def load_weights(path: Path, options: ExecutorOptions) -> ResidentWeights | None:
    """Prepare a file of packed weights for speed: compare it with its hashes, and copy it where that pays.

    Returns:
        None where the file is best used as ONNX Runtime maps it.

    Raises:
        HerdError: a block was altered.
    """
    hashes = BlockHashes(path) if options.verify else None
    with open_file(path) as file:
        count, copies = os.fstat(file.fileno()).st_size, not is_in_large_pages(file.fileno())
        content = _huge_pages(count) if copies else _mapped(file.fileno(), count)

        def check(begin: int) -> None:
            block = content[begin : begin + BLOCK]
            if copies and os.preadv(file.fileno(), [block.data], begin) != len(block):
                raise HerdError(f"{path} became shorter while it was read: copy or rebuild the bundle")
            if hashes is not None:
                hashes.check(begin // BLOCK, block.data)

        if copies or hashes is not None:
            with ThreadPoolExecutor(options.threads or os.cpu_count()) as pool:
                list(pool.map(check, range(0, count, BLOCK)))
    return ResidentWeights(path, content) if copies else None


def is_in_large_pages(file: int) -> bool:
    """Whether the operating system keeps an open file in large pages, tried on its beginning; a small file needs none.

    A file that is in any huge page is for the rest in pages of some size between: the file system has such pages.
    """
    count = min(os.fstat(file).st_size, _TRIED)
    if count < _TRIED or not _SMAPS.exists():
        return count < _TRIED
    content = _mapped(file, count)
    content[:: mmap.PAGESIZE].max()  # pages are mapped when they are first read
    found = re.search(rf"^{content.ctypes.data:x}-.*?^FilePmdMapped: +(\d+) kB", _SMAPS.read_text(encoding="utf-8"),
                      re.MULTILINE | re.DOTALL)
    return found is not None and int(found[1]) > 0


class ResidentWeights:
    """The content of a weight file in memory of our own.

    Args:
        path: the file, for messages.
        content: its bytes.
    """

    def __init__(self, path: Path, content: Bytes) -> None:
        self._path, self._bytes = path, content

    def values(self, session: Any) -> Values:
        """What overrides a session's initializers, by name.

        Raises:
            HerdError: the graph names what is not in the file.
        """
        places = json.loads(session.get_modelmeta().custom_metadata_map.get(KEY, "{}"))
        return {item.name: ort_value(self._part(item.name, item.shape, *places.get(item.name, (-1, 0))))
                for item in session.get_overridable_initializers()}

    def _part(self, name: str, shape: Iterable[int], offset: int, count: int) -> Bytes:
        if not 0 <= offset <= offset + count <= len(self._bytes) or count != np.prod(list(shape), dtype=np.int64):
            raise HerdError(f"{self._path} has no {name!r} where the graph says: rebuild the bundle")
        return self._bytes[offset : offset + count].reshape(tuple(shape))


def _mapped(file: int, count: int) -> Bytes:
    return np.frombuffer(mmap.mmap(file, count, access=mmap.ACCESS_READ), np.uint8)


def _huge_pages(count: int) -> Bytes:
    """Memory that begins at a huge page, in huge pages where the operating system has them for who asks."""
    region = mmap.mmap(-1, count + _HUGE_PAGE, **_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    whole: Bytes = np.frombuffer(region, np.uint8)
    first = -whole.ctypes.data % _HUGE_PAGE
    return whole[first : first + count]
