"""One rank of test_nccl.py, on a hollow NCCL: nccl_worker.py DESCRIPTOR PLAN BEHAVIOUR TIMEOUT.

Without a descriptor (-) the ranks meet through gloo, as on several machines.
"""

from __future__ import annotations

import os
import sys
import time

import ml_dtypes
import numpy as np

from herdgraph.errors import HerdError
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.runtimes.distributed import gloo
from herdgraph.runtimes.distributed.collectives import Collectives
from herdgraph.runtimes.distributed.nccl import Nccl
from herdgraph.runtimes.distributed.shared_memory import SharedMemory
from herdgraph.runtimes.executors.device_array import DeviceArray

PIECE = 1 << 14
"""Float32 values of a slot of the hollow NCCL."""


class Stream:
    """Of a device on which everything is done at once."""

    handle = 7

    def activate(self) -> None:
        """There is nothing to make current."""

    def is_done(self) -> bool:
        return True


def on_device(array: np.ndarray) -> DeviceArray:
    return DeviceArray(array.ctypes.data, array.shape, array.dtype.name)


def exchange(nccl: Nccl, plan: ShardPlan) -> None:
    """Everything once, against numpy; another value on every rank."""
    for size in (1, 7, PIECE, PIECE + 1, 5 * PIECE // 2):
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            all_reduce(nccl, size, dtype)
    for rows in (1, 3):
        all_gather(nccl, rows)
    hand_on(nccl, plan)
    logits = np.full(9, nccl.rank, np.float32)
    if nccl.rank == nccl.world - 1:
        nccl.send(logits, 0)
    if nccl.rank == 0:
        nccl.receive(logits, nccl.world - 1)
        np.testing.assert_array_equal(logits, nccl.world - 1)
    words = np.full(40, nccl.rank, np.int64)
    nccl.broadcast(words)
    np.testing.assert_array_equal(words, 0)
    nccl.barrier()
    nccl.watch.wait()


def all_reduce(nccl: Nccl, size: int, dtype: type) -> None:
    """Every rank gets the same bits: those of a sum in float32, rounded once."""
    values = [np.random.default_rng(rank).normal(size=size).astype(dtype) for rank in nccl.group]
    wanted = np.sum([value.astype(np.float32) for value in values], 0, np.float32).astype(dtype)
    value, result = values[nccl.rank - nccl.group.start], np.zeros(size, dtype)
    nccl.all_reduce(on_device(value), on_device(result))
    np.testing.assert_array_equal(result, wanted)
    nccl.all_reduce(on_device(value), on_device(value))
    np.testing.assert_array_equal(value, wanted)


def all_gather(nccl: Nccl, rows: int) -> None:
    """Along the last axis, whatever is before it."""
    values = [np.arange(rows * 5, dtype=np.float32).reshape(1, rows, 5) + 100 * rank for rank in nccl.group]
    result = np.zeros((1, rows, 5 * len(values)), np.float32)
    nccl.all_gather(on_device(values[nccl.rank - nccl.group.start]), on_device(result))
    np.testing.assert_array_equal(result, np.concatenate(values, -1))


def hand_on(nccl: Nccl, plan: ShardPlan) -> None:
    """From stage to stage, each rank to the same place; more than a slot."""
    hidden = np.full((3, PIECE), nccl.rank, np.float32).astype(ml_dtypes.bfloat16)
    if plan.stage_of(nccl.rank):
        nccl.receive(on_device(hidden), nccl.rank - plan.width)
        np.testing.assert_array_equal(hidden.astype(np.float32), nccl.rank - plan.width)
        hidden[...] = nccl.rank
    if nccl.rank + plan.width < nccl.world:
        nccl.send(on_device(hidden), nccl.rank + plan.width)


def forever(nccl: Nccl, plan: ShardPlan) -> None:
    """Sums and what stages hand on, until something goes wrong; says how long that took to be seen."""
    value, before = np.ones(100, np.float32), time.monotonic()
    try:
        while True:
            nccl.all_reduce(on_device(value), on_device(np.empty_like(value)))
            hand_on(nccl, plan)
            nccl.watch.wait()
            before = time.monotonic()
    finally:
        print(f"{time.monotonic() - before:.1f}", flush=True)


def meet(descriptor: str, plan: ShardPlan, rank: int, timeout: float) -> Collectives:
    """What the ranks exchange through in the host's memory."""
    if descriptor != "-":
        return SharedMemory(int(descriptor), rank, plan.world, plan.group_of(rank), timeout=timeout)
    gloo.meet(rank, plan.world, 30.0)
    return gloo.Gloo(plan, rank, timeout=timeout)


def main() -> None:
    descriptor, plan, behaviour, timeout = sys.argv[1], ShardPlan.parse(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    host = meet(descriptor, plan, int(os.environ["RANK"]), timeout)
    try:
        host.barrier()
        nccl = Nccl(host, plan, Stream())
        print("met", flush=True)
        if behaviour == "forever":
            forever(nccl, plan)
        exchange(nccl, plan)
        nccl.close()
        print(nccl.spent.count, flush=True)
    except HerdError as error:
        host.fail(str(error))
        print(error, flush=True)
        os._exit(1)


if __name__ == "__main__":
    main()
