"""The registry of executors: the manifest names the one that runs a bundle."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import HerdError
from ..bundle.manifest import Bundle
from .options import ExecutorOptions
from .ort.cuda.load import load_cuda
from .ort.load import load_graphs
from .runner import Runner
from .tensorrt.load import load_plans
from .vision import VisionRunner

Runners = tuple[Runner, VisionRunner | None]
"""Of the decoder and of the image tower; None for models that read text only."""

EXECUTORS: dict[str, Callable[[Bundle, ExecutorOptions], Runners]] = {
    "onnxruntime": load_graphs, "onnxruntime-cuda": load_cuda, "tensorrt": load_plans,
}


def load_executor(bundle: Bundle, options: ExecutorOptions) -> Runners:
    """Load the graphs of a bundle that is not sharded.

    Raises:
        HerdError: the bundle is for an executor that this version does not have, or the executor cannot load it.
    """
    name = bundle.manifest.executor
    if name not in EXECUTORS:
        raise HerdError(f"{bundle.directory} is built for target {bundle.manifest.target!r} and executor {name!r}, "
                        f"this runtime has {' and '.join(EXECUTORS)}: update herdgraph, or build for another target")
    if name == "onnxruntime" and (options.device, options.gpu_memory) != (None, None):
        raise HerdError(f"{bundle.directory} is built for target {bundle.manifest.target!r}, which runs on a CPU and "
                        "takes neither device nor gpu_memory: leave them out, or build with --target cuda")
    return EXECUTORS[name](bundle, options)
