"""What code that computes with weights needs to know of where they lie."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..config import HerdConfig
from .tensors.lazy import Index


class TensorReader(Protocol):
    """Reads a model's tensors by canonical name: a ``Checkpoint``, a view of one, or a stand-in for one."""

    @property
    def config(self) -> HerdConfig:
        """Configuration of the whole model."""

    def read(self, name: str, index: Index = None) -> Tensor:
        """A tensor, or entries of its first axis, in the stored type."""
