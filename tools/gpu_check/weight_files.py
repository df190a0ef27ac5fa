"""Weights of models that are too large to make: every tensor of a type is the beginning of one file of random numbers.

Two initializers of a graph may name the same bytes. On the GPU each has memory of its own, so that speed and memory are
those of a real model; on disk there is one file per type.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from .graphs import TYPES, Graph
from .layer_graph import Source, filling

_TILE = 8 << 20
"""Elements that are random; what is longer repeats them."""


class WeightFiles:
    """Files of random weights in a folder, as long as the longest tensor of their kind.

    Args:
        folder: beside the model's file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._elements: dict[tuple[str, bool], int] = {}

    def source(self) -> Source:
        """Makes weights that lie in the files."""

        def make(graph: Graph, name: str, shape: list[int], kind: str) -> str:
            key = kind, name.endswith(".scales")
            self._elements[key] = max(self._elements.get(key, 0), int(np.prod(shape)))
            return graph.external(name, shape, kind, _file(*key))

        return make

    def write(self) -> int:
        """Write what the weights that were made need; returns the bytes."""
        total = 0
        for (kind, scales), count in self._elements.items():
            name = "x.scales" if scales else "x"
            tile = filling(np.random.default_rng(0), [min(count, _TILE) // 1024 + 1, 1024], name, kind).reshape(-1)
            if not scales and kind != "uint8":
                tile = tile * np.float32(0.02) / np.float32(tile.std())
            data = tile.astype(TYPES[kind][1] if kind != "bf16" else ml_dtypes.bfloat16).tobytes()
            size = count * np.dtype(TYPES[kind][1]).itemsize
            with (self.folder / _file(kind, scales)).open("wb") as file:
                for begin in range(0, size, len(data)):
                    file.write(data[: size - begin])
            total += size
        return total


def _file(kind: str, scales: bool) -> str:
    return f"{kind}{'.scales' if scales else ''}.bin"
