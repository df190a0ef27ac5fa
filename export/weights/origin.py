"""Where an initializer comes from: the checkpoint's tensors that it is made of, and the expert whose slice it is.

A tensor that is made of another, transposed, joined, rotated, rounded or quantized, hands its origin on. Recipes and
calibrations are asked by it. The names of values in a graph are for people: nothing reads an origin out of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import onnx_ir as ir

_KEY = "herdgraph.origin"
_Tensor = TypeVar("_Tensor", bound=ir.TensorProtocol)


@dataclass(frozen=True)
class Origin:
    """Which part of a checkpoint an initializer holds.

    Attributes:
        names: canonical names of the stored tensors; several when their matrices stand side by side.
        expert: index along the first axis of the stored tensor, None for all of it.
    """

    names: tuple[str, ...]
    expert: int | None = None

    @property
    def name(self) -> str:
        """The first of the stored tensors. Those that stand side by side read the same input: it answers for all."""
        return self.names[0]


def origin_of(tensor: ir.TensorProtocol) -> Origin:
    """The origin that was recorded for a tensor; without one, the tensor's own name is that of a stored tensor."""
    found = tensor.meta.get(_KEY)
    return found if isinstance(found, Origin) else Origin((tensor.name or "",))


def with_origin(tensor: _Tensor, origin: Origin) -> _Tensor:
    """Record the origin of a tensor; returns the tensor."""
    tensor.meta[_KEY] = origin
    return tensor


def joined_origin(tensors: Iterable[ir.TensorProtocol]) -> Origin:
    """The origin of matrices side by side."""
    return Origin(tuple(name for tensor in tensors for name in origin_of(tensor).names))
