"""ONNX Runtime sessions: created in one place, with the options that latency wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ..errors import HerdError
from .pages import released_while_loading

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
        threads: threads of one operator, None for one per core.
        memory: whether weights are packed.
    """
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    if memory == "low":
        options.add_session_config_entry("session.disable_prepacking", "1")
    data = [path.with_suffix(".data")] if memory == "fast" else []
    try:
        with released_while_loading(*data):
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own classes, all of them plain Exceptions
        raise HerdError(f"onnxruntime {onnxruntime.__version__} cannot load {path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
