"""Stands where ``tensorrt_rtx`` would be found, for processes that run plans of ``plan_zip.py`` without a GPU."""

from __future__ import annotations

from typing import Any

from support.host_tensorrt import HostEngine

__version__ = "1.7.1.116"


class Logger:
    ERROR = 1

    def __init__(self, _severity: int) -> None:
        pass


class TensorIOMode:
    OUTPUT = "output"


class Runtime:
    def __init__(self, _logger: Any) -> None:
        pass

    def deserialize_cuda_engine(self, plan: bytes) -> HostEngine:
        return HostEngine.read(plan)
