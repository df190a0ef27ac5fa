"""A rank of the NCCL checks, in a process of its own: ``python -m gpu_check.nccl_rank RANK WORLD FOLDER [hollow]``.

Prints what it found, a JSON document by the name of the check; rank 0 leaves NCCL's unique id in the folder.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .hollow import preload_hollow

ELEMENTS = 5120
"""Of a hidden state of Scout."""
PATIENCE = 20.0


def main() -> None:
    """All exchanges, then rank 0 is left alone and lets go."""
    rank, world, folder, *hollow = sys.argv[1:]
    if hollow:
        os.environ.setdefault("HOLLOW_NCCL_DIR", folder)
        preload_hollow()
    from herdgraph.runtimes.distributed import libnccl

    from .cudart import Cudart

    cuda, library = Cudart(), libnccl.load()
    link = library.communicator(_unique_id(library, int(rank), Path(folder)), int(world), int(rank))
    found = {"version": library.version}
    checks: dict[str, Callable[..., Any]] = {"all_reduce float32": _reduce, "all_reduce bfloat16": _reduce_bf16,
                                             "all_gather rows": _gather, "send and receive": _pass_on}
    for name, check in checks.items():
        if int(world) > 1 or check is not _pass_on:
            found[name] = check(cuda, link, int(rank), int(world))
    if int(world) > 1:
        found["abort"] = _abandoned(cuda, link, int(rank))
    print(json.dumps(found), flush=True)
    os._exit(0)  # what was abandoned need not end


def _unique_id(library: Any, rank: int, folder: Path) -> bytes:
    path = folder / "unique_id"
    if rank == 0:
        path.with_suffix(".part").write_bytes(library.unique_id())
        path.with_suffix(".part").rename(path)
    began = time.monotonic()
    while not path.exists() and time.monotonic() - began < PATIENCE:
        time.sleep(0.01)
    return path.read_bytes()


def _values(rank: int, kind: Any = np.float32) -> Any:
    """Small whole numbers, whose sums are exact in every type."""
    return np.random.default_rng(rank).integers(-8, 8, ELEMENTS).astype(kind)


def _reduce(cuda: Any, link: Any, rank: int, world: int, kind: Any = np.float32, name: str = "float32") -> bool:
    mine = _values(rank, kind)
    sent, got = cuda.upload(mine), cuda.upload(np.zeros_like(mine))
    link.all_reduce(sent, got, ELEMENTS, name, cuda.stream)
    wanted = sum(_values(other, np.float32) for other in range(world))
    return bool((cuda.download(got, mine).astype(np.float32) == wanted).all())


def _reduce_bf16(cuda: Any, link: Any, rank: int, world: int) -> bool:
    return _reduce(cuda, link, rank, world, ml_dtypes.bfloat16, "bfloat16")


def _gather(cuda: Any, link: Any, rank: int, world: int) -> bool:
    mine = _values(rank).reshape(4, -1)
    whole = np.concatenate([_values(other).reshape(4, -1) for other in range(world)], axis=1)
    sent, got = cuda.upload(mine), cuda.upload(np.zeros_like(whole))
    link.all_gather_rows(sent, got, 4, mine.nbytes // 4, world, cuda.stream)
    return bool((cuda.download(got, whole) == whole).all())


def _pass_on(cuda: Any, link: Any, rank: int, world: int) -> bool:
    """Rank 0 sends to rank 1, which sends it back with 1 added."""
    del world
    mine = _values(7)
    held = cuda.upload(mine if rank == 0 else np.zeros_like(mine))
    if rank == 0:
        link.send(held, ELEMENTS, "float32", 1, cuda.stream)
        link.receive(held, ELEMENTS, "float32", 1, cuda.stream)
        return bool((cuda.download(held, mine) == mine + 1).all())
    link.receive(held, ELEMENTS, "float32", 0, cuda.stream)
    back = cuda.upload(cuda.download(held, mine) + 1)
    link.send(back, ELEMENTS, "float32", 0, cuda.stream)
    cuda.synchronize()
    return True


def _abandoned(cuda: Any, link: Any, rank: int) -> bool:
    """Rank 1 goes; rank 0, whose exchange can never end, lets go of it within seconds."""
    if rank:
        return True
    value = cuda.upload(_values(0))
    call = partial(link.all_reduce, value, value, ELEMENTS, "float32", cuda.stream)
    threading.Thread(target=call, daemon=True).start()  # which a hollow NCCL blocks, and a real one blocks the stream
    time.sleep(0.5)
    began = time.monotonic()
    link.abort()
    return time.monotonic() - began < 5


if __name__ == "__main__":
    main()
