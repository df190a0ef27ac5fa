"""A CUDA device that computes nothing: stub libraries that are loaded before onnxruntime looks for the real ones."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from pathlib import Path

VARIABLE = "HERDGRAPH_HOLLOW_CUDA"
"""Names the folder with the stub libraries; without it they are built as the tests build them."""
_ORDER = ("libcuda.so.1", "libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libnccl.so.2")
_TESTS = Path(__file__).parents[2] / "tests"


def preload_hollow() -> None:
    """Load those of the folder that are there, in the order in which they need one another."""
    folder = Path(os.environ.get(VARIABLE) or _built())
    for path in (folder / name for name in _ORDER):
        if path.exists():
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _built() -> Path:
    """What ``tests/support/hollow_cuda`` builds for the onnxruntime-gpu that is installed."""
    sys.path.append(str(_TESTS))
    spec = importlib.util.find_spec("onnxruntime")
    headers = next((Path(entry) / "nvidia/cu13/include" for entry in sys.path
                    if (Path(entry) / "nvidia/cu13/include").is_dir()), None)
    if spec is None or spec.origin is None or headers is None:
        raise SystemExit("a hollow device needs onnxruntime-gpu, nvidia-cuda-runtime and nvidia-cuda-crt")
    provider = Path(spec.origin).parent / "capi" / "libonnxruntime_providers_cuda.so"
    return Path(importlib.import_module("support.hollow_cuda.libraries").build(provider, headers))
