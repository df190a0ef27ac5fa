"""Packed weights: mapped at once, and copied into huge pages later.

A graph of our own operators holds its weights as they are used, so nothing is made of them while it loads: ONNX Runtime
maps the file. A mapped file lies in small pages on most systems, and a processor spends up to a third of its time
finding them. So with ``memory="fast"`` the file is also read into huge pages of our own, on a thread that begins after
the first call; the graph's initializers may be overridden, and calls that begin afterwards use what is copied by then.
The mapping's pages of it are given back, so that the weights are in memory once and not twice.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import HerdError
from ....reading import open_file, read_bytes
from ...bundle.blocks import check_all_blocks
from ...bundle.manifest import WEIGHTS, Bundle
from ..options import ExecutorOptions
from .session import GRAPH_BYTES, Values, ort_value

KEY = "herdgraph.weights"
"""Where a graph says which initializer lies where in the file beside it: a JSON object of offset and size by name."""
_HUGE_PAGE = 2 << 20
SMALL = 64 << 20
"""Bytes of a file that is not worth a copy."""
PART = 128 << 20
"""Bytes that are copied before calls use them: so much is in memory twice."""
_PRIVATE: Any = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""Memory that may be shared, which is what Python asks for otherwise, gets no huge pages."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def is_packed(graph: Path) -> bool:
    """Whether a graph holds its weights as our own operators use them."""
    return graph.is_file() and KEY.encode() in read_bytes(graph, most=GRAPH_BYTES)


@contextmanager
def verified(bundle: Bundle, names: Iterable[str], options: ExecutorOptions) -> Iterator[None]:
    """Compare files of a bundle with their hashes: weights beside what is done within, everything else before.

    With ``memory="low"`` weights are compared when they are read instead (``blocks.py``).

    Args:
        bundle: the bundle.
        names: of files.
        options: whether they are compared, and with how many threads.

    Raises:
        HerdError: a file was altered; what was done within is of no use then.
    """
    if not options.verify:
        yield
        return
    weights = {name for name in names if name.endswith(WEIGHTS)}
    bundle.verify(set(names) - weights)
    hashes = [bundle.block_hashes(bundle.directory / name) for name in sorted(weights)] if options.prepack else []
    with ThreadPoolExecutor(1) as pool:
        checking = pool.submit(check_all_blocks, hashes, options.threads)
        try:
            yield
        finally:
            checking.result()


def copy_in_parts(path: Path) -> Iterator[ResidentWeights]:
    """Copy a weight file into huge pages; what there is of it after every part, to the end of the file."""
    with open_file(path) as file:
        content = _huge_pages(os.fstat(file.fileno()).st_size)
        for begin in range(0, len(content), PART):
            part = content[begin : begin + PART]
            if os.preadv(file.fileno(), [part.data], begin) != len(part):
                return  # the file became shorter
            yield ResidentWeights(path, content, begin + len(part))


class ResidentWeights:
    """The content of a weight file in memory of our own.

    Args:
        path: the file, for messages.
        content: memory for its bytes.
        copied: how many of them are there, from the first on.
    """

    def __init__(self, path: Path, content: Bytes, copied: int) -> None:
        self._path, self._bytes, self._copied = path, content, copied

    def values(self, session: Any) -> Values:
        """What overrides those of a session's initializers that are there, by name.

        Raises:
            HerdError: the graph names what is not in the file.
        """
        places = json.loads(session.get_modelmeta().custom_metadata_map.get(KEY, "{}"))
        found = {}
        for item in session.get_overridable_initializers():
            offset, count = places.get(item.name, (-1, 0))
            if not 0 <= offset <= offset + count <= len(self._bytes) or count != np.prod(item.shape, dtype=np.int64):
                raise HerdError(f"{self._path} has no {item.name!r} where the graph says: rebuild the bundle")
            if offset + count <= self._copied:
                found[item.name] = ort_value(self._bytes[offset : offset + count].reshape(item.shape))
        return found


def _huge_pages(count: int) -> Bytes:
    """Memory that begins at a huge page, in huge pages where the operating system has them for who asks."""
    region = mmap.mmap(-1, count + _HUGE_PAGE, **_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    whole: Bytes = np.frombuffer(region, np.uint8)
    first = -whole.ctypes.data % _HUGE_PAGE
    return whole[first : first + count]
