"""Lets every process that finds this folder on its path run ranks of the target ``cuda`` on a CPU.

Their graphs are twins in float32 (``cuda_rank_twin.py``), "device" memory is the host's, the stream does everything at
once. The rest is what runs on GPUs: ``CudaRank``, ``CudaRankGraph``, ``Nccl`` over a hollow NCCL, cache blocks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime

from herdgraph.runtimes.distributed import cuda_rank
from herdgraph.runtimes.executors.ort.cuda import load
from herdgraph.runtimes.executors.ort.cuda.views import Place


class Stream:
    """Of a device on which everything is done at once."""

    handle = 7

    def __init__(self, place: Place) -> None:
        del place

    def activate(self) -> None:
        """There is nothing to make current."""

    def is_done(self) -> bool:
        return True

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Nothing is run while it is recorded."""
        return work


def session(path: Path, place: Place, *, stream: int = 0, tiles: int = 0) -> Any:
    del place, stream, tiles
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


replaced: dict[str, Any] = {
    "require_gpu": lambda _place, _options: None, "share_memory": lambda _place: None,
    "free_bytes": lambda _place: 8 << 30, "Place": lambda _kind, _index: Place("cpu"),
    "CudaStream": Stream, "cuda_session": session,
}
load.cuda_session = session
for name, value in replaced.items():
    assert hasattr(cuda_rank, name), name
    setattr(cuda_rank, name, value)
