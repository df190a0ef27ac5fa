"""From a bundle of the target ``cuda`` to what runs it on one GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from .....errors import HerdError
from ....bundle.manifest import Bundle
from ....kv_cache.sequence import Features
from ...options import ExecutorOptions
from ...vision import VisionRunner
from ..session import check_names
from .graph import CudaGraph, WholeGraph
from .inputs import CallSize
from .memory import cache_budget, call_bytes, free_bytes, memory_limit
from .runner import MOST_RECORDED, CudaRunner
from .session import cuda_session, place_of, require_gpu
from .views import Place

_BOUNDS = ("attention_metadata.global", "attention_metadata.chunked")


def load_cuda(bundle: Bundle, options: ExecutorOptions) -> tuple[CudaRunner, VisionRunner | None]:
    """Runners of a bundle's decoder and image graphs on one GPU.

    Raises:
        HerdError: there is no GPU that works, onnxruntime cannot run a graph on it, or its memory is too small.
    """
    place, config = place_of(options.device), bundle.manifest.config
    require_gpu(place, options)
    free = free_bytes(place)
    limit = memory_limit(place, free, options)
    vision = load_tower(bundle, place)
    path = bundle.graph("decoder")
    session = cuda_session(path, place, records=True)
    graph = WholeGraph(session, path, place)
    check_inputs(graph)
    calls = call_bytes(config.text) + 4 * MOST_RECORDED * config.text.vocab_size
    cache_bytes = cache_budget(limit, free - free_bytes(place), calls, options.cache_bytes)
    return CudaRunner(graph, config, cache_bytes), vision


def check_inputs(graph: CudaGraph) -> None:
    """Compare what a decoder takes with what its runner will bind."""
    known = {*CallSize(0, 0, 0, 0, 0, 0).layout(0), *_BOUNDS}
    for item in graph.inputs:
        if item.name not in known and not item.name.startswith("past."):
            raise HerdError(f"{graph.path} has an unknown input {item.name!r}: it is another graph; rebuild the bundle")


def load_cuda_tower(bundle: Bundle, options: ExecutorOptions) -> VisionRunner | None:
    """The image tower alone, for rank 0 of a sharded bundle, which has loaded its part of the decoder."""
    return load_tower(bundle, place_of(options.device))


def load_tower(bundle: Bundle, place: Place) -> VisionRunner | None:
    """The image tower; None for models that read text only."""
    if not bundle.manifest.config.vision:
        return None
    path = bundle.graph("vision")
    session = cuda_session(path, place, tiles=1)
    check_names(session, path, inputs={"pixel_values"}, outputs={"image_features"})

    def run(pixel_values: np.ndarray[Any, Any]) -> Features:
        tiles = np.split(pixel_values, len(pixel_values))
        return np.concatenate([session.run(["image_features"], {"pixel_values": tile})[0] for tile in tiles])

    return VisionRunner(run, bundle.manifest.config)
