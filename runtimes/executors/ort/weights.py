"""Packed weights in memory of our own.

A graph of our own operators holds its weights as they are used, so nothing is made of them while it loads. They are
initializers that may be overridden, and that is done with ``memory="fast"``: the file is read into huge pages, which
spares the processor a third of its time for finding pages, and every block is compared with its hash while it is in the
processor's cache. With ``memory="low"`` ONNX Runtime maps the file and pages come and go.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import HerdError
from ....reading import open_file, read_bytes
from ...bundle.blocks import BLOCK, BlockHashes
from ...bundle.manifest import Bundle
from .session import GRAPH_BYTES, Values, ort_value

KEY = "herdgraph.weights"
"""Where a graph says which initializer lies where in the file beside it: a JSON object of offset and size by name."""
_HUGE_PAGE = 2 << 20
_PRIVATE: Any = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""Memory that may be shared, which is what Python asks for otherwise, gets no huge pages."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def is_packed(graph: Path) -> bool:
    """Whether the weights of a graph are read by ``ResidentWeights``."""
    return graph.is_file() and KEY.encode() in read_bytes(graph, most=GRAPH_BYTES)


def checked_by_block(bundle: Bundle, *, prepack: bool) -> set[str]:
    """Weight files that are compared with their hashes block by block, not as a whole before they are used."""
    def graphs(name: str) -> list[Path]:
        path = bundle.directory / name
        return [path.with_suffix(".onnx"), path.with_suffix(".00.onnx")]

    return {name for name in bundle.weight_files if not prepack or any(map(is_packed, graphs(name)))}


class ResidentWeights:
    """The content of a weight file.

    Args:
        path: the file.
        threads: that read, None for one per core.
        verify: compare every block with its hash.

    Raises:
        HerdError: a block was altered.
    """

    def __init__(self, path: Path, threads: int | None, *, verify: bool) -> None:
        self._path, hashes = path, BlockHashes(path) if verify else None
        with open_file(path) as file, ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            self._bytes = _huge_pages(os.fstat(file.fileno()).st_size)

            def read(begin: int) -> None:
                block = self._bytes[begin : begin + BLOCK]
                if os.preadv(file.fileno(), [block.data], begin) != len(block):
                    raise HerdError(f"{path} became shorter while it was read: copy or rebuild the bundle")
                if hashes is not None:
                    hashes.check(begin // BLOCK, block.data)

            list(pool.map(read, range(0, len(self._bytes), BLOCK)))

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


def _huge_pages(count: int) -> Bytes:
    """Memory that begins at a huge page, in huge pages where the operating system has them for who asks."""
    region = mmap.mmap(-1, count + _HUGE_PAGE, **_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    whole: Bytes = np.frombuffer(region, np.uint8)
    first = -whole.ctypes.data % _HUGE_PAGE
    return whole[first : first + count]
