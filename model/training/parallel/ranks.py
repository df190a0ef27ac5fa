"""This process among others: how ranks are arranged, sums over them, and gradients that mean the same on one and many.

    world = replica x expert x tensor,      rank = (replica index · expert + expert index) · tensor + tensor index

A *data rank* is a pair (replica, expert): it has batches of its own, and its tensor ranks compute them together. Who
holds what (``sharding.py``):

===================  =================================================  ==================================
parameters           split among                                        whole while they are used on
===================  =================================================  ==================================
routed experts       expert x tensor, by expert; then replica (FSDP2)   their one owner in each replica
heads, inner widths  tensor; then all data ranks (FSDP2)                the tensor ranks of a data rank
everything else      all data ranks (FSDP2)                             every rank
===================  =================================================  ==================================
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ....errors import HerdError


@dataclass(frozen=True)
class ParallelOptions:
    """What ranks share besides the data; what is left over of them are replicas.

    Attributes:
        expert: ranks that share the routed experts of a replica. Each has batches of its own, and tokens travel.
        tensor: ranks that share heads and inner widths. They have the same batches, and partial sums travel.
    """

    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, ranks in (("expert", self.expert), ("tensor", self.tensor)):
            if ranks < 1:
                raise HerdError(f"parallel.{name} is {ranks}, it must be at least 1")

    @property
    def expert_parallel_size(self) -> int:
        """Ranks that each hold a part of the routed experts of a replica."""
        return self.expert * self.tensor


@dataclass(frozen=True)
class Ranks:
    """This process among the others of a run: its place, and what it exchanges with them.

    Attributes:
        rank: index of this process.
        count: processes.
        parallel: what they share besides the data.
        mesh: how they are arranged, axes ``replica``, ``expert`` and ``tensor``; None for a process alone.
        data_mesh: the data ranks, axis ``data``.
    """

    rank: int = 0
    count: int = 1
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    mesh: Any = None
    data_mesh: Any = None

    @classmethod
    def alone(cls) -> Ranks:
        """A process alone."""
        return cls()

    @classmethod
    def from_environment(cls, parallel: ParallelOptions | None = None) -> Ranks:
        """What torchrun says; alone when it says nothing.

        Raises:
            HerdError: the others do not answer, or their number does not fit the options.
        """
        parallel = parallel or ParallelOptions()
        _require_ranks(int(os.environ.get("WORLD_SIZE", "1")), parallel)
        if "RANK" not in os.environ:
            return cls.alone()
        if not dist.is_initialized():
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            except (RuntimeError, ValueError) as error:
                raise HerdError(f"rank {os.environ['RANK']} cannot reach the others: {str(error).splitlines()[0]}; "
                                "start all ranks with torchrun") from error
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # about speed, where rare
        count = dist.get_world_size()
        shape = (count // parallel.expert_parallel_size, parallel.expert, parallel.tensor)
        mesh = init_device_mesh(_device(), shape, mesh_dim_names=("replica", "expert", "tensor"))
        return cls(dist.get_rank(), count, parallel, mesh, mesh["replica", "expert"]._flatten("data"))

    @property
    def first(self) -> bool:
        """Whether this one writes files and prints."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which batches this one sees."""
        return self.rank // self.parallel.tensor

    @property
    def data_ranks(self) -> int:
        """Ranks that see different batches."""
        return self.count // self.parallel.tensor

    def sum(self, value: float) -> float:
        """The sum of a number over the data ranks."""
        return float(self.sum_tensor(torch.tensor(value, dtype=torch.float64)))

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the data ranks."""
        if self.mesh is not None:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.data_mesh.get_group())
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """The maximum of a tensor over all ranks, element by element."""
        if self.mesh is not None:
            tensor = tensor.clone()
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every data rank, in order, once every rank has given its own."""
        if self.mesh is None:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found[::self.parallel.tensor]

    def close(self) -> None:
        """Wait for the others, then take leave: a rank that goes early would break their last exchange."""
        if self.mesh is not None:
            dist.barrier()
            dist.destroy_process_group()


def nearest_divisor(value: int, wanted: int) -> int:
    """The divisor of a number that is nearest to a wanted one, the smaller of two."""
    return min((divisor for divisor in range(1, value + 1) if value % divisor == 0), key=lambda d: abs(d - wanted))


def _require_ranks(count: int, parallel: ParallelOptions) -> None:
    expert_parallel_size = parallel.expert_parallel_size
    if count % expert_parallel_size:
        fitting = max(1, round(count / expert_parallel_size)) * expert_parallel_size
        raise HerdError(f"{count} process{'es' if count > 1 else ''} cannot be arranged in groups of parallel.expert="
                        f"{parallel.expert} x parallel.tensor={parallel.tensor} = {expert_parallel_size}: start "
                        f"{fitting} with torchrun --nproc-per-node {fitting}, or choose a product of "
                        f"{nearest_divisor(count, expert_parallel_size)}")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
