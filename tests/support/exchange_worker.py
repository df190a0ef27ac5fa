"""One rank of test_sharded_transport.py: exchange_worker.py TRANSPORT DESCRIPTOR BEHAVIOUR TIMEOUT."""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from herdgraph.errors import HerdError
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.runtimes.distributed.collectives import Collectives
from herdgraph.runtimes.distributed.gloo import Gloo, meet
from herdgraph.runtimes.distributed.shared_memory import SLOT, SharedMemory


def exchange(link: Collectives) -> None:
    """Everything once, in sizes around those of a slot; another value on every rank."""
    rank, world = link.rank, link.world
    for size in (1, 7, SLOT // 4, SLOT // 4 + 1, 5 * SLOT // 8):
        value = np.arange(size, dtype=np.float32) + rank
        wanted = world * np.arange(size, dtype=np.float32) + world * (world - 1) / 2
        result = np.zeros_like(value)
        link.all_reduce(value, result)
        np.testing.assert_allclose(result, wanted)
        link.all_reduce(value, value)
        np.testing.assert_allclose(value, wanted)
    value = np.arange(6, dtype=np.float32).reshape(1, 2, 3) + 10 * rank
    joined = np.zeros((1, 2, 3 * world), np.float32)
    link.all_gather(value, joined)
    np.testing.assert_array_equal(joined, np.concatenate([value + 10 * (r - rank) for r in range(world)], -1))
    hidden = np.full((3, SLOT // 4), rank, np.float32)
    if rank + 1 < world:
        link.send(hidden, rank + 1)
    if rank:
        link.receive(hidden, rank - 1)
        np.testing.assert_array_equal(hidden, rank - 1)
    words = np.full(40, rank, np.int64)
    link.broadcast(words)
    np.testing.assert_array_equal(words, 0)
    link.barrier()
    assert link.spent.count == 11 + (rank > 0) + (rank + 1 < world)


def main() -> None:
    transport, descriptor, behaviour, timeout = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if transport == "gloo":
        meet(rank, world, 30.0)
        link: Collectives = Gloo(ShardPlan(tensor=world), rank, timeout=timeout)
    else:
        link = SharedMemory(descriptor, rank, world, range(world), timeout=timeout)
    link.barrier()
    if behaviour == "exchange":
        exchange(link)
        link.close()
        print("done", flush=True)
        return
    print("going", flush=True)
    value = np.ones(100, np.float32)
    try:
        while True:
            link.all_reduce(value, np.empty_like(value))
            time.sleep(0.001)
    except HerdError as error:
        print(error, flush=True)
        os._exit(1)


if __name__ == "__main__":
    main()
