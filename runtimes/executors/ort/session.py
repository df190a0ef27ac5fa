"""ONNX Runtime sessions: created in one place, with the options that latency wants."""

from __future__ import annotations

from collections.abc import Sequence as Items
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import HerdError
from ....reading import read_bytes
from ...native.library import library_path
from ..options import ExecutorOptions
from .page_release import drop_page_cache_during_load

GRAPH_BYTES = 2 << 30
"""Most bytes of a graph without its weights: the limit of its format."""
_OWN_OPERATORS = b"herdgraph.cpu"
"""Their ONNX domain, as graphs that use it say."""
_LOOPS = (b"\x22\x04Loop", b"\x22\x04Scan")
"""How the operators that repeat a graph are written: field 4 of a node, a text of 4 letters."""

Values = dict[str, Any]
"""``OrtValue`` by name."""


def load_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        HerdError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise HerdError(
            "onnxruntime is not installed: pip install 'herdgraph[cpu]' (or 'herdgraph[gpu]'; never both)"
        ) from error
    return onnxruntime


def run_bound(session: Any, io: Any, _values: tuple[Values, ...]) -> None:
    """A call over bound values, held here: a binding of onnxruntime before 1.30 does not keep their arrays alive."""
    session.run_with_iobinding(io)


def ort_value(array: np.ndarray[Any, Any]) -> Any:
    """An ``OrtValue`` over an array's own memory."""
    return load_onnxruntime().OrtValue.ortvalue_from_numpy(array)


def create_session(path: Path, *, provider: str, options: ExecutorOptions) -> Any:
    """An ``InferenceSession`` for one graph file of a bundle.

    Args:
        path: the ``.onnx`` file; its external data lies beside it.
        provider: the execution provider that the graph was lowered for.
        options: ``threads`` counts only where no sharded engine has made threads for all sessions of the process.
    """
    with drop_page_cache_during_load(*([path.with_suffix(".data")] if options.prepack else [])):
        return open_session(path, provider, _session_options(options))


def create_sessions(paths: Items[Path], data: Path, *, provider: str, options: ExecutorOptions) -> list[Any]:
    """Sessions for graphs that run one after another: they share threads and working memory.

    Args:
        paths: the ``.onnx`` files.
        data: weights of all of them.
        provider: the execution provider that the graphs were lowered for.
        options: ``threads`` has to be a number.
    """
    assert options.threads, "ranks share the machine's cores, so each is told its number"
    _share(options.threads)
    shared = _session_options(options)
    shared.add_session_config_entry("session.use_env_allocators", "1")
    with drop_page_cache_during_load(*([data] if options.prepack else [])):
        return [open_session(path, provider, shared) for path in paths]


def check_names(session: Any, path: Path, *, inputs: set[str], outputs: set[str]) -> None:
    """Compare what a graph takes, caches left out, and gives with what its callers will bind.

    Raises:
        HerdError: a name is missing or unknown.
    """
    taken = {item.name for item in session.get_inputs() if not item.name.startswith("past.")}
    given = {item.name for item in session.get_outputs()}
    for found, wanted, word in ((taken, inputs, "input"), (given, outputs, "output")):
        for name in sorted(found ^ wanted):
            problem = "an unknown" if name in found else "no"
            raise HerdError(f"{path} has {problem} {word} {name!r}: it is another graph; rebuild the bundle")


def _session_options(wanted: ExecutorOptions) -> Any:
    options = load_onnxruntime().SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    if _pool:  # onnxruntime then refuses sessions with threads of their own
        options.use_per_session_threads = False
        options.intra_op_num_threads = options.inter_op_num_threads = 0  # any number would be ignored with a warning
    else:
        options.intra_op_num_threads = wanted.threads or 0
    if not wanted.prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("herdgraph.read_ahead", "1")  # read when our operators are registered
    if (library := library_path()) is not None:
        options.register_custom_ops_library(str(library))
    return options


_pool: list[int] = []
"""Threads of the pool that this process's sharded engines share: made once, of the size that is asked for first."""


def _share(threads: int) -> None:
    """Give the process's sessions threads and working memory to share."""
    _share_memory()
    if threads > 1 and not _pool:
        load_onnxruntime().set_global_thread_pool_sizes(threads, 1)
        _pool.append(threads)
    if _pool and _pool != [threads]:
        raise HerdError(f"sharded engines of one process share {_pool[0]} threads, {threads} were asked for: load them "
                        "with the same number")


@cache
def _share_memory() -> None:
    onnxruntime = load_onnxruntime()
    cpu = onnxruntime.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0,
                                    onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(cpu, None)


def open_session(path: Path, provider: str, options: Any, provider_options: dict[str, str] | None = None) -> Any:
    """A session for a graph that nothing in it forbids to run.

    Args:
        path: the graph.
        provider: the execution provider that it was lowered for.
        options: onnxruntime's, of the session.
        provider_options: of the execution provider.

    Raises:
        HerdError: onnxruntime does not have the provider, or cannot load the graph.
    """
    onnxruntime = load_onnxruntime()
    # ONNX Runtime itself would warn and take the CPU, on which other operators are fast.
    if provider not in (found := onnxruntime.get_available_providers()):
        raise HerdError(f"{path} is built for {provider}, this onnxruntime {onnxruntime.__version__} has "
                        f"{', '.join(found)}: install the onnxruntime that has it, or build for another target")
    graph = read_bytes(path, most=GRAPH_BYTES)
    if _OWN_OPERATORS in graph and library_path() is None:
        raise HerdError(f"{path} needs herdgraph's own CPU operators, which are not installed here: install a wheel of "
                        "herdgraph that has them for this platform, or compile them (docs/native.md); or build the "
                        "bundle with --target cpu-stock")
    if any(loop in graph for loop in _LOOPS):
        raise HerdError(f"{path} holds a loop, which no graph of herdgraph does and which may never end: rebuild the "
                        "bundle")
    try:
        # Its fallback would print four lines and try the CPU, also where the CPU was what failed.
        return onnxruntime.InferenceSession(str(path), options, providers=[(provider, provider_options or {})],
                                            enable_fallback=0)
    except Exception as error:  # onnxruntime raises its own classes, all of them plain Exceptions
        raise HerdError(f"onnxruntime {onnxruntime.__version__} cannot load {path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
