"""From a bundle of the target ``cuda`` to what runs it on one GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .....errors import HerdError
from .....files import size
from ....bundle.manifest import Bundle
from ....kv_cache.sequence import Features
from ...options import ExecutorOptions
from ...vision import VisionRunner
from ..session import check_names
from .inputs import CallSize
from .memory import SHARE, cache_budget, call_bytes, free_bytes
from .runner import MOST_RECORDED, CudaRunner
from .session import cuda_session, place_of, require_gpu
from .views import Place

_BOUNDS = ("attention_metadata.global", "attention_metadata.chunked")


def load_cuda(bundle: Bundle, options: ExecutorOptions) -> tuple[CudaRunner, VisionRunner | None]:
    """Runners of a bundle's decoder and image graphs on one GPU.

    Raises:
        HerdError: there is no GPU that works, onnxruntime cannot run a graph on it, or its memory is too small.
    """
    if not options.prepack:
        raise HerdError("memory is 'low', which leaves weights in the file, and a GPU has them in its own memory: "
                        "leave it out")
    place, config = place_of(options.device), bundle.manifest.config
    require_gpu(place)
    free = free_bytes(place)
    limit = int(free * SHARE) if options.gpu_memory is None else options.gpu_memory
    if limit > free:
        raise HerdError(f"gpu_memory is {size(limit)}, {place.kind}:{place.index} has {size(free)} free: give less, or "
                        "end what uses the GPU")
    vision = _load_tower(bundle, place)
    path = bundle.graph("decoder")
    session = cuda_session(path, place, records=True)
    _check_names(session, path)
    calls = call_bytes(config.text) + 4 * MOST_RECORDED * config.text.vocab_size
    cache_bytes = cache_budget(limit, free - free_bytes(place), calls, options.cache_bytes)
    return CudaRunner(session, path, config, place, cache_bytes), vision


def _check_names(session: Any, path: Path) -> None:
    """Compare what a decoder takes with what its runner will bind."""
    known = {*CallSize(0, 0, 0, 0, 0, 0).layout(0), *_BOUNDS}
    for item in session.get_inputs():
        if item.name not in known and not item.name.startswith("past."):
            raise HerdError(f"{path} has an unknown input {item.name!r}: it is another graph; rebuild the bundle")


def _load_tower(bundle: Bundle, place: Place) -> VisionRunner | None:
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
