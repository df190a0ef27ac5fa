"""Sessions that run on a GPU, or not at all.

onnxruntime takes the CPU where CUDA does not start, and the CPU for single operators that have no CUDA kernel. Both are
refused: a graph of the target ``cuda`` runs on a GPU as a whole.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from .....errors import HerdError
from ....machine.cuda_checks import check_cuda
from ...options import ExecutorOptions
from ..session import load_onnxruntime, open_session
from .views import Place

PROVIDER = "CUDAExecutionProvider"
_SESSION = {
    "session.disable_cpu_ep_fallback": "1",
    "ep.cuda.fpa_intb_gemm": "1",  # products of 4 and 8 bits that unpack weights as they go
}
_PROVIDER = {
    "use_tf32": "0",  # would give other experts to tokens that are nearly undecided
    "arena_extend_strategy": "kSameAsRequested",  # the rest of the memory is for keys and values
}


def place_of(device: str | None) -> Place:
    """The GPU that ``cuda:0`` names; the first one unless somebody says otherwise.

    Raises:
        HerdError: another name.
    """
    kind, _, index = (device or "cuda:0").partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise HerdError(f"device is {device!r}, a bundle of the target cuda runs on cuda:0, or another GPU's number")
    return Place("cuda", int(index or 0))


def require_gpu(place: Place, options: ExecutorOptions) -> None:
    """Refuse before anything is loaded what cannot work.

    Raises:
        HerdError: no GPU, an old driver, a GPU without kernels, a package that is missing, or an option for CPUs.
    """
    if not options.prepack:
        raise HerdError("memory is 'low', which leaves weights in the file, and a GPU has them in its own memory: "
                        "leave it out")
    check_cuda(place.index)
    onnxruntime = load_onnxruntime()
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls(cudnn=False)


def _take_memory_as_asked() -> None:
    """Let values on the GPU take their own size: onnxruntime would take the next power of two, twice 40 GB at worst."""
    state = load_onnxruntime().capi._pybind_state
    if hasattr(state, "set_arena_extend_strategy"):  # the only way to tell the memory that no session owns
        state.set_arena_extend_strategy(state.ArenaExtendStrategy.kSameAsRequested)


@cache
def share_memory(place: Place) -> None:
    """Let sessions that run one after another on a stream have one working memory."""
    onnxruntime = load_onnxruntime()
    gpu = onnxruntime.OrtMemoryInfo("Cuda", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, place.index,
                                    onnxruntime.OrtMemType.DEFAULT)
    as_requested = onnxruntime.OrtArenaCfg({"arena_extend_strategy": 1})  # of the size that is asked for
    onnxruntime.create_and_register_allocator_v2(PROVIDER, gpu, {}, as_requested)


def asynchronous() -> Any:
    """Options of a call that is put on the stream and waited for by somebody else."""
    options = load_onnxruntime().RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def cuda_session(
    path: Path, place: Place, *, records: bool = False, tiles: int | None = None, stream: int | None = None
) -> Any:
    """A session of which every operator runs on a GPU.

    Args:
        path: the graph; its weights lie beside it.
        place: the GPU.
        records: whether calls are to be recorded as CUDA graphs.
        tiles: of every call, where the graph has tiles: what is computed of their number is known beforehand then, and
            nothing is left for the CPU.
        stream: CUDA's number of the one that calls run on, None for one of the session's own.

    Raises:
        HerdError: onnxruntime cannot load the graph, or would run some of it on the CPU.
    """
    load_onnxruntime().set_default_logger_severity(3)
    _take_memory_as_asked()
    options = load_onnxruntime().SessionOptions()
    options.log_severity_level = 4
    if tiles is not None:
        options.add_free_dimension_override_by_name("tiles", tiles)
    for name, value in _SESSION.items():
        options.add_session_config_entry(name, value)
    provider_options = _PROVIDER | {"device_id": str(place.index)} | ({"enable_cuda_graph": "1"} if records else {})
    if stream is not None:
        provider_options["user_compute_stream"] = str(stream)
        options.add_session_config_entry("session.use_env_allocators", "1")  # see share_memory
    session = open_session(path, PROVIDER, options, provider_options)
    if (found := session.get_providers())[0] != PROVIDER:
        raise HerdError(f"{path} is for a GPU and onnxruntime would run it on {found[0]}: `herdgraph doctor` says what "
                        "CUDA lacks here")
    return session
