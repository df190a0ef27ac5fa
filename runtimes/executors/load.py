"""The registry of executors: the manifest names the one that runs a bundle."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import HerdError
from ..bundle.manifest import Bundle
from .options import ExecutorOptions
from .ort.cuda.load import load_cuda, load_cuda_tower
from .ort.load import load_graphs, load_vision
from .runner import Runner
from .tensorrt.load import load_plans, load_vision_plan
from .vision import VisionRunner

Runners = tuple[Runner, VisionRunner | None]
"""Of the decoder and of the image tower; None for models that read text only."""

EXECUTORS: dict[str, Callable[[Bundle, ExecutorOptions], Runners]] = {
    "onnxruntime": load_graphs, "onnxruntime-cuda": load_cuda, "tensorrt": load_plans,
}
VISION: dict[str, Callable[[Bundle, ExecutorOptions], VisionRunner | None]] = {
    "onnxruntime": load_vision, "onnxruntime-cuda": load_cuda_tower, "tensorrt": load_vision_plan,
}
"""Load the image tower alone, for rank 0 of a sharded bundle."""


def require_executor(bundle: Bundle) -> None:
    """Refuse a bundle that nothing here runs.

    Raises:
        HerdError: the bundle is for an executor that this version does not have.
    """
    name = bundle.manifest.executor
    if name not in EXECUTORS:
        raise HerdError(f"{bundle.directory} is built for target {bundle.manifest.target!r} and executor {name!r}, "
                        f"this runtime has {' and '.join(EXECUTORS)}: update herdgraph, or build for another target")


def refuse_gpu_options(bundle: Bundle, options: ExecutorOptions) -> None:
    """Refuse what says something about a GPU, where there is none.

    Raises:
        HerdError: there is such an option.
    """
    if bundle.manifest.executor == "onnxruntime" and (options.device, options.gpu_memory) != (None, None):
        raise HerdError(f"{bundle.directory} is built for target {bundle.manifest.target!r}, which runs on a CPU and "
                        "takes neither device nor gpu_memory: leave them out, or build with --target cuda")


def load_executor(bundle: Bundle, options: ExecutorOptions) -> Runners:
    """Load the graphs of a bundle that is not sharded.

    Raises:
        HerdError: the bundle is for an executor that this version does not have, or the executor cannot load it.
    """
    require_executor(bundle)
    refuse_gpu_options(bundle, options)
    return EXECUTORS[bundle.manifest.executor](bundle, options)
