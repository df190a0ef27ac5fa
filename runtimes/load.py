"""From a bundle to what runs it: in this process, or as rank 0 of several."""

from __future__ import annotations

from collections.abc import Sequence as Items

from ..errors import HerdError
from .bundle.manifest import WEIGHTS, Bundle
from .distributed.load import load_sharded
from .distributed.options import ShardOptions, check_devices, threads_of
from .executors.load import VISION, Runners, load_executor, refuse_gpu_options, require_executor
from .executors.options import ExecutorOptions
from .executors.ort.load import begin_copy
from .executors.ort.weights import verified


def load_runners(
    bundle: Bundle, options: ExecutorOptions, *, devices: Items[str] | None, timeout: float
) -> Runners:
    """Load the graphs of a bundle, sharded or whole. Arguments and errors as in ``Engine.load``."""
    ranks = bundle.manifest.shards.plan.world if bundle.manifest.shards else 1
    places = check_devices(devices, ranks)
    if bundle.manifest.shards:
        require_executor(bundle)
        refuse_gpu_options(bundle, options)
        if options.device is not None:
            raise HerdError(f"device is {options.device!r}, and every rank of a sharded bundle takes the GPU of its "
                            "number: leave it out, and say with CUDA_VISIBLE_DEVICES which GPUs there are")
        shards = ShardOptions(threads_of(options.threads, ranks), options.verify, options.prepack, timeout, places,
                              options.cache_bytes, options.gpu_memory)
        return load_sharded(bundle, shards), VISION[bundle.manifest.executor](bundle, options)
    with verified(bundle, bundle.manifest.files, options):
        runners = load_executor(bundle, options)
    begin_copy(runners[0], bundle.graph("decoder").with_suffix(WEIGHTS), options)
    return runners
