"""Exchanges through torch.distributed, on the arrays' own memory: for ranks on several machines. Imports torch late."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from ...errors import HerdError
from ...model.config.shard_plan import ShardPlan
from .collectives import Array, Collectives, RankError, stalled

_FOREVER = timedelta(days=365)
"""How long a rank waits for a command while nobody asks anything."""
_FAILED = "herdgraph/failed"
_HERE = "herdgraph/here/"
_ROLL_CALL = 2.0
"""Seconds in which ranks that have lost a connection write down that they are alive."""


def _distributed() -> Any:
    try:
        import torch.distributed as dist
    except ImportError as error:
        raise HerdError("ranks on several machines exchange through torch, which is not installed: pip install torch"
                        ) from error
    return dist


def meet(rank: int, world: int, timeout: float) -> None:
    """Meet the other ranks at ``MASTER_ADDR``:``MASTER_PORT``, unless this process has done so before.

    Raises:
        HerdError: the address is in use, or the others do not come.
    """
    dist = _distributed()
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT")
    if port is None:
        raise HerdError("RANK is set but MASTER_PORT is not: start every rank with torchrun, or unset RANK")
    if dist.is_initialized():
        return
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=timeout),
                                init_method=f"tcp://{address}:{port}")
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0][:200]
        if "in use" in text or "EADDRINUSE" in text:
            raise HerdError(f"port {port} of {address} is in use: set MASTER_PORT to another") from error
        raise HerdError(f"rank {rank} did not meet {world - 1} others at {address}:{port} within {timeout:g} s: start "
                        f"all of them, or give a longer timeout ({text})") from error


class Gloo(Collectives):
    """See ``Collectives``.

    Args:
        plan: arranges the ranks in stages.
        rank: index of this process, which has met the others.
        timeout: seconds that a rank may keep the others waiting in the middle of a call.
    """

    def __init__(self, plan: ShardPlan, rank: int, *, timeout: float) -> None:
        super().__init__(rank, plan.world, plan.group_of(rank), timeout)
        self._dist = _distributed()
        limit = timedelta(seconds=timeout)
        stages = [self._dist.new_group(list(plan.group_of(stage * plan.width)), timeout=limit)
                  for stage in range(plan.pipeline)]
        self._stage = stages[plan.stage_of(rank)]
        self._everybody = self._dist.new_group(timeout=limit)
        self._patient = self._dist.new_group(timeout=_FOREVER)
        self._store = self._dist.distributed_c10d._get_default_store()

    def all_reduce(self, value: Array, result: Array) -> None:
        """See ``Collectives``."""
        with self._exchange(self.group):
            if result is not value:
                result[...] = value
            self._dist.all_reduce(_tensor(result), group=self._stage)

    def all_gather(self, value: Array, result: Array) -> None:
        """See ``Collectives``."""
        import torch

        with self._exchange(self.group):
            parts = [torch.empty(value.shape, dtype=_tensor(value).dtype) for _ in self.group]
            self._dist.all_gather(parts, _tensor(value), group=self._stage)
            torch.cat(parts, -1, out=_tensor(result))

    def send(self, value: Array, target: int) -> None:
        """See ``Collectives``."""
        with self._exchange(range(target, target + 1)):
            self._dist.send(_tensor(value), target, group=self._everybody)

    def receive(self, result: Array, source: int) -> None:
        """See ``Collectives``."""
        with self._exchange(range(source, source + 1)):
            self._dist.recv(_tensor(result), source, group=self._everybody)

    def broadcast(self, value: Array) -> None:
        """See ``Collectives``."""
        with self._failures(range(self.world)):
            self._dist.broadcast(_tensor(value), 0, group=self._patient)

    def barrier(self) -> None:
        """See ``Collectives``."""
        with self._failures(range(self.world)):
            self._dist.barrier(group=self._patient)

    def gather(self, value: Any) -> list[Any]:
        """A value of every rank, in order."""
        found: list[Any] = [None] * self.world
        with self._failures(range(self.world)):
            self._dist.all_gather_object(found, value, group=self._everybody)
        return found

    def fail(self, message: str) -> None:
        """See ``Collectives``."""
        try:
            self._store.set(_FAILED, message)
        except RuntimeError:
            return  # whoever keeps the store is gone, and so nobody can read it

    def check(self) -> None:
        """See ``Collectives``: a rank that failed has said so; one that was killed is missed by the next exchange."""
        with self._failures(range(self.world)):
            told = self._store.check([_FAILED])
        if told:
            raise RankError(self._store.get(_FAILED).decode())

    def mark(self, peer: int | None = None) -> None:
        """See ``Collectives``: here ranks are called by their names after a timeout."""

    def blame(self) -> str:
        """See ``Collectives``."""
        told, missing = self._roll_call(range(self.world))
        return told or (stalled(missing, self.timeout) if missing else "")

    def close(self) -> None:
        """See ``Collectives``."""
        if self._dist.is_initialized():
            self._dist.destroy_process_group()

    @contextmanager
    def _exchange(self, others: range) -> Iterator[None]:
        with self.counted(), self._failures(others):
            yield

    @contextmanager
    def _failures(self, others: range) -> Iterator[None]:
        """What torch says of lost ranks, in words for people."""
        try:
            yield
        except RuntimeError as error:
            message = self._explained(str(error), others)
            self.fail(message)
            raise RankError(message) from error

    def _explained(self, error: str, others: range) -> str:
        """Find out which ranks have ended, after an exchange failed here."""
        told, missing = self._roll_call(others)
        if told:
            return told
        if "timed out" in error.lower():
            return stalled(missing, self.timeout)
        names = ", ".join(map(str, missing)) or "another"
        return f"rank {names} has ended: {error.splitlines()[0][:200]}"

    def _roll_call(self, others: range) -> tuple[str, list[int]]:
        """What a rank has told of its failure, or which ranks do not answer.

        A rank that ends breaks connections of others, whose next errors would blame whoever they talk to. So every
        rank whose exchange fails closes its own connections, writes its name into the shared store, and waits for the
        others' names: those that do not come are the ranks that have ended.
        """
        self.close()
        missing = [other for other in others if other != self.rank]
        try:
            self._store.set(f"{_HERE}{self.rank}", "")
            until = time.monotonic() + _ROLL_CALL
            while time.monotonic() < until and missing:
                if self._store.check([_FAILED]):
                    return str(self._store.get(_FAILED).decode()), []
                missing = [other for other in missing if not self._store.check([f"{_HERE}{other}"])]
                time.sleep(_ROLL_CALL / 40)
        except RuntimeError:
            missing = [0]  # the store is in rank 0's process
        return "", missing


def _tensor(array: Array) -> Any:
    import torch

    return torch.from_numpy(array)
