"""Stands where CUDA's runtime would be found: in the host's memory."""

from __future__ import annotations

from typing import Any

from support.host_tensorrt import HostRuntime

_RUNTIME = HostRuntime()


def __getattr__(name: str) -> Any:
    return getattr(_RUNTIME, name)
