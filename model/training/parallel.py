"""This process among others: who it is, sums over all, and gradients that mean the same on one rank and on many."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ...errors import HerdError


@dataclass(frozen=True)
class Ranks:
    """A process and its kind.

    Attributes:
        rank: index of this process.
        count: processes.
        mesh: how they are arranged (``torch.distributed.DeviceMesh``), None for a process alone.
    """

    rank: int = 0
    count: int = 1
    mesh: Any = None

    @classmethod
    def alone(cls) -> Ranks:
        """A process alone."""
        return cls()

    @classmethod
    def from_environment(cls) -> Ranks:
        """What torchrun says; alone when it says nothing.

        Raises:
            HerdError: the others do not answer.
        """
        if "RANK" not in os.environ:
            return cls.alone()
        if not dist.is_initialized():
            try:
                dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            except (RuntimeError, ValueError) as error:
                raise HerdError(f"rank {os.environ['RANK']} cannot reach the others: {str(error).splitlines()[0]}; "
                                "start all ranks with torchrun") from error
        count = dist.get_world_size()
        return cls(dist.get_rank(), count, init_device_mesh(_device(), (count,), mesh_dim_names=("data",)))

    @property
    def first(self) -> bool:
        """Whether this one writes files and prints."""
        return self.rank == 0

    @property
    def data_ranks(self) -> int:
        """Ranks that see different batches."""
        return self.count

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks."""
        return float(self.sum_tensor(torch.tensor(value, dtype=torch.float64)))

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        if self.mesh is not None:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every rank, in order."""
        if self.mesh is None:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def largest(self, tensor: Tensor) -> Tensor:
        """The maximum of a tensor over all ranks, element by element."""
        if self.mesh is not None:
            tensor = tensor.clone()
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def close(self) -> None:
        """Wait for the others, then take leave: a rank that goes early would break their last exchange."""
        if self.mesh is not None:
            dist.barrier()
            dist.destroy_process_group()

    def shard(self, model: nn.Module) -> None:
        """Spread a model's parameters, gradients and optimiser state over the ranks (FSDP2), layer by layer."""
        if self.mesh is None:
            return
        from torch.distributed.fsdp import fully_shard

        for part in model.modules():
            if type(part).__name__ in ("DecoderLayer", "VisionLayer"):
                fully_shard(part, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is spread over ranks, joined; every rank has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
