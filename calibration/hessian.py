"""Hessians XᵀX of the inputs X of matrix products: what GPTQ needs to know of the data.

    H = sum over tokens of  x^T x        [K, K], for the input x [K] of a weight [K, N]

X is taken without the weight of the norm before it (``model/quantization/hessian_basis.py``).

The error of a quantised product on the data is  tr((W - Q)^T H (W - Q)).  A routed expert's Hessian is that of its own
tokens, scaled by its score as in the model, and of a share of the tokens of all experts of its layer, which is what an
expert that saw few tokens is quantised by.

The Hessians of a layer with 128 experts may be larger than the memory: 48 GB in Maverick. Experts run one after the
other, so that one Hessian of a stack is in memory, and goes to its place in the layer's file when the next begins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..model.checkpoint.tensors.header import read_header
from ..model.checkpoint.tensors.write import write_zeros

SHARED_HESSIAN_WEIGHT = 0.05
"""Weight with which the Hessians of all experts of a layer are added to that of each."""


class HessianSums:
    """Adds up XᵀX by the name of the weight that X meets, in a safetensors file; experts are stacked, [E, K, K].

    Args:
        path: the file, created with zeros.
        shapes: of all Hessians that it is to hold, by name.

    Raises:
        OSError: the file cannot be written; ``add`` and ``finish`` raise it, too.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        write_zeros(path, shapes)
        self._path, self._places = path, read_header(path)
        self._sums: dict[str, tuple[int | None, Tensor]] = {}
        self._of_all: dict[str, Tensor] = {}
        """By the name of a stack, the sum over the experts that are done."""

    def add(self, name: str, x: Tensor, *, expert: int | None = None) -> None:
        """Take in the rows of x [..., K]. All rows of an expert come before those of another one."""
        rows = x.reshape(-1, x.shape[-1]).float()
        last, total = self._sums.get(name, (None, None))
        if total is None or last != expert:
            self._put(name)
            total = torch.zeros(rows.shape[1], rows.shape[1])
            self._sums[name] = expert, total
        total.addmm_(rows.T, rows)

    def finish(self) -> None:
        """Write what is still in memory, and add to every expert's Hessian a share of all of its layer."""
        for name in list(self._sums):
            self._put(name)
        for name, of_all_KK in self._of_all.items():
            for expert in range(self._places[name].shape[0]):
                self._write(name, expert, self._places[name].read(expert).add_(of_all_KK, alpha=SHARED_HESSIAN_WEIGHT))

    def _put(self, name: str) -> None:
        """Write the sum of a name, if there is one, and forget it."""
        if name not in self._sums:
            return
        expert, total = self._sums.pop(name)
        self._write(name, expert, total)
        if expert is not None:
            self._of_all[name] = self._of_all[name].add_(total) if name in self._of_all else total

    def _write(self, name: str, expert: int | None, total: Tensor) -> None:
        with self._path.open("rb+", buffering=0) as file:
            file.seek(self._places[name].offset + (expert or 0) * total.nbytes)
            data = total.numpy().reshape(-1).view(np.uint8).data
            while data:
                data = data[os.write(file.fileno(), data) :]
