"""From a bundle to what runs it: in this process, or as rank 0 of several."""

from __future__ import annotations

from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor

from .bundle.manifest import Bundle
from .distributed.front_end import load_sharded
from .distributed.launch import ShardOptions, check_devices, threads_of
from .executors.load import VISION, Runners, load_executor, require_executor
from .executors.options import ExecutorOptions
from .executors.ort.weights import checked_by_block
from .kv_cache.pool import free_cache_bytes


def load_runners(
    bundle: Bundle, options: ExecutorOptions, *, verify: bool, devices: Items[str] | None, timeout: float
) -> Runners:
    """Load the graphs of a bundle, sharded or whole. Arguments and errors as in ``Engine.load``."""
    ranks = bundle.manifest.shards.plan.world if bundle.manifest.shards else 1
    places = check_devices(devices, ranks)
    if bundle.manifest.shards:
        require_executor(bundle)
        # Ranks of one machine would each take half of what is free.
        each = free_cache_bytes() // ranks if options.cache_bytes is None else options.cache_bytes
        shards = ShardOptions(threads_of(options.threads, ranks), verify, options.prepack, timeout, places, each)
        return load_sharded(bundle, shards), VISION[bundle.manifest.executor](bundle, options)
    return _load_verified(bundle, options) if verify else load_executor(bundle, options)


def _load_verified(bundle: Bundle, options: ExecutorOptions) -> Runners:
    """Load a whole bundle, and hash its weights meanwhile."""
    bundle.verify(set(bundle.manifest.files) - set(bundle.weight_files))
    by_block = checked_by_block(bundle, prepack=options.prepack)
    weights = [name for name in bundle.weight_files if name not in by_block]
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(bundle.verify, weights)
        try:
            return load_executor(bundle, options)
        finally:
            hashing.result()
