"""ONNX Runtime sessions: created in one place, with the options that latency wants."""

from __future__ import annotations

from collections.abc import Sequence as Items
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ....errors import HerdError
from .page_release import drop_page_cache_during_load

Memory = Literal["fast", "low"]
"""``fast``: weights packed for speed; ``low``: weights used as they are mapped. See ``Engine.load``."""


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


def create_session(path: Path, *, threads: int | None = None, memory: Memory = "fast") -> Any:
    """An ``InferenceSession`` on the CPU for one graph file of a bundle.

    Args:
        path: the ``.onnx`` file; its external data lies beside it.
        threads: threads of one operator, None for one per core. Where a sharded engine made threads for all sessions
            of the process, they are used.
        memory: whether weights are packed.
    """
    options = _options(memory, threads or 0)
    with drop_page_cache_during_load(*([path.with_suffix(".data")] if memory == "fast" else [])):
        return _session(path, options)


def create_sessions(paths: Items[Path], data: Path, *, threads: int, memory: Memory = "fast") -> list[Any]:
    """Sessions for graphs that run one after another: they share threads and working memory.

    Args:
        paths: the ``.onnx`` files.
        data: weights of all of them.
        threads: threads of one operator.
        memory: whether weights are packed.
    """
    _share(threads)
    with drop_page_cache_during_load(*([data] if memory == "fast" else [])):
        return [_session(path, _shared_options(threads, memory)) for path in paths]


def _options(memory: Memory, threads: int) -> Any:
    options = load_onnxruntime().SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    if _pool:  # onnxruntime then refuses sessions with threads of their own
        options.use_per_session_threads = False
        options.intra_op_num_threads = options.inter_op_num_threads = 0  # any number would be ignored with a warning
    else:
        options.intra_op_num_threads = threads
    if memory == "low":
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _shared_options(threads: int, memory: Memory) -> Any:
    options = _options(memory, threads)
    options.add_session_config_entry("session.use_env_allocators", "1")
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


def _session(path: Path, options: Any) -> Any:
    onnxruntime = load_onnxruntime()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own classes, all of them plain Exceptions
        raise HerdError(f"onnxruntime {onnxruntime.__version__} cannot load {path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
