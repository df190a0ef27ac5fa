"""What every rank does before it serves: see that all have the same bundle, and load its own part."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from ...errors import HerdError
from ...files import sha256_of
from ..bundle.manifest import MANIFEST, Bundle
from ..executors.options import ExecutorOptions
from ..executors.ort.load import begin_copy
from ..executors.ort.weights import verified
from ..executors.tensorrt.rank_plan import load_rank_plan
from .collectives import Collectives
from .cuda_rank import load_cuda_rank
from .host_rank import HostRankGraph, load_host_rank
from .options import ShardOptions, cores
from .stage import Shard

LOADERS: dict[str, Callable[[Bundle, Collectives, ExecutorOptions], Shard]] = {
    "onnxruntime": load_host_rank, "onnxruntime-cuda": load_cuda_rank, "tensorrt": load_rank_plan,
}
"""By executor, what loads a rank's part."""


def load_shard(bundle: Bundle, link: Collectives, options: ShardOptions) -> Shard:
    """What a rank loads; every rank calls it, and none goes on before all have loaded.

    Raises:
        HerdError: this rank has another bundle than rank 0, or files that were altered.
    """
    _check_same_bundle(bundle, link)
    if options.devices:
        os.sched_setaffinity(0, cores(options.devices[link.rank]))
    loading = ExecutorOptions(options.threads, options.prepack, options.verify, options.cache_bytes,
                              gpu_memory=options.gpu_memory)
    with verified(bundle, bundle.files_of(link.rank), loading):
        shard = LOADERS[bundle.manifest.executor](bundle, link, loading)
    if isinstance(shard.stage, HostRankGraph):
        begin_copy(shard.runner, shard.stage.weights, loading)
    link.barrier()
    return shard


def _check_same_bundle(bundle: Bundle, link: Collectives) -> None:
    mine = sha256_of(bundle.directory / MANIFEST)
    theirs = np.frombuffer(bytes.fromhex(mine), np.uint8).copy()
    link.broadcast(theirs)
    if (found := theirs.tobytes().hex()) != mine:
        raise HerdError(f"{bundle.directory} is another bundle than rank 0 has: its manifest is {mine[:12]}…, rank 0's "
                        f"is {found[:12]}…; copy the same bundle to every machine")
