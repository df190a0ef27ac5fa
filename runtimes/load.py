"""From a bundle to what runs it: in this process, or as rank 0 of several."""

from __future__ import annotations

from collections.abc import Sequence as Items

from .bundle.manifest import WEIGHTS, Bundle
from .distributed.launch import ShardOptions, check_devices, threads_of
from .distributed.load import load_sharded
from .executors.load import VISION, Runners, load_executor, require_executor
from .executors.options import ExecutorOptions
from .executors.ort.load import begin_copy
from .executors.ort.weights import verified
from .kv_cache.pool import free_cache_bytes


def load_runners(
    bundle: Bundle, options: ExecutorOptions, *, devices: Items[str] | None, timeout: float
) -> Runners:
    """Load the graphs of a bundle, sharded or whole. Arguments and errors as in ``Engine.load``."""
    ranks = bundle.manifest.shards.plan.world if bundle.manifest.shards else 1
    places = check_devices(devices, ranks)
    if bundle.manifest.shards:
        require_executor(bundle)
        # Ranks of one machine would each take half of what is free.
        each = free_cache_bytes() // ranks if options.cache_bytes is None else options.cache_bytes
        threads = threads_of(options.threads, ranks)
        shards = ShardOptions(threads, options.verify, options.prepack, timeout, places, each)
        return load_sharded(bundle, shards), VISION[bundle.manifest.executor](bundle, options)
    with verified(bundle, bundle.manifest.files, options):
        runners = load_executor(bundle, options)
    begin_copy(runners[0], bundle.graph("decoder").with_suffix(WEIGHTS), options)
    return runners
