"""Tensors that may be spread over ranks (``DTensor``): the whole of one, and this rank's part."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that is spread over ranks, joined; every rank has to call it. Other tensors are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread over ranks. Other tensors are returned as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
