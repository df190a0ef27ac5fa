"""Parts of a device's memory as values of ONNX Runtime.

onnxruntime gives memory of a device as a value of one shape, and takes any memory that is described in DLPack's way. So
a part of a value is a description of it, made here; nothing is copied. With such parts a call's inputs lie side by side
and are uploaded together, a block of a cache is copied on the device, and single rows of logits come back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..session import load_onnxruntime

_DEVICES = {"cpu": 1, "cuda": 2}
"""DLPack's numbers of kinds of devices."""
_CODES = {"i": 0, "u": 1, "f": 2}
"""DLPack's numbers of kinds of elements, by numpy's letter."""


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_described: dict[int, tuple[Any, ...]] = {}
"""Descriptions that a value of onnxruntime refers to, and what they describe, by their address."""


def _forget(address: int, described: dict[int, tuple[Any, ...]] = _described) -> None:
    described.pop(address, None)  # an argument: globals are gone when an interpreter ends


_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_forget)
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


@dataclass(frozen=True)
class Place:
    """A device, by onnxruntime's name.

    Attributes:
        kind: ``cuda``; ``cpu`` lets the same code run, and be tested, on a CPU.
        index: of several GPUs.
    """

    kind: str = "cuda"
    index: int = 0

    def empty(self, shape: Items[int], element: int | type[np.generic]) -> Any:
        """A new value; what is in it is not known.

        Args:
            shape: of the value.
            element: numpy's type, or ONNX's number of one that numpy does not have.
        """
        return load_onnxruntime().OrtValue.ortvalue_from_shape_and_type(list(shape), element, self.kind, self.index)

    def part(self, value: Any, offset: int, shape: Items[int], dtype: type[np.generic] = np.uint8) -> Any:
        """Some of a value's memory as another value, which keeps the memory alive.

        Args:
            value: made by ``empty``.
            offset: in bytes.
            shape: of the part.
            dtype: of its elements.
        """
        kind = np.dtype(dtype)
        sizes = (ctypes.c_int64 * max(1, len(shape)))(*shape)
        tensor = _Tensor(value.data_ptr() + offset, _DEVICES[self.kind], self.index, len(shape), _CODES[kind.kind],
                         8 * kind.itemsize, 1, sizes, None, 0)
        managed = _Managed(tensor, None, ctypes.cast(_deleter, ctypes.c_void_p))
        address = ctypes.addressof(managed)
        _described[address] = managed, sizes, value
        return load_onnxruntime().OrtValue.from_dlpack(_capsule(address, b"dltensor", None))
