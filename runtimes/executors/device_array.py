"""Values in a GPU's memory, as far as whoever only hands them on needs to know them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

ITEM_BYTES = {"int8": 1, "uint8": 1, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2, "float32": 4, "float8": 1}
"""Bytes of an element, by type."""


@dataclass(frozen=True)
class DeviceArray:
    """C-contiguous values. Whoever made them keeps the memory alive.

    Attributes:
        pointer: address of the first element.
        shape: sizes.
        dtype: one of ``ITEM_BYTES``.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * ITEM_BYTES[self.dtype]
