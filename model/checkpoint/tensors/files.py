"""Which files a lazily read tensor lies in, for messages about what was read."""

from __future__ import annotations

from pathlib import Path

from .lazy import LazyTensor

_SHOWN = 2


def files_of(tensor: LazyTensor) -> list[Path]:
    """The files below a tensor and its views, each once; none where they are not known by name."""
    path = getattr(tensor, "path", None)
    below = [*getattr(tensor, "parts", ()), *([tensor.source] if hasattr(tensor, "source") else [])]
    return list(dict.fromkeys([*([path] if path else []), *(file for part in below for file in files_of(part))]))


def located(name: str, tensor: LazyTensor) -> str:
    """A tensor's name and where it lies: ``norm.weight in model-00002-of-00007.safetensors``."""
    files = [path.name for path in files_of(tensor)]
    more = f" and {len(files) - _SHOWN} more files" if len(files) > _SHOWN else ""
    return f"{name} in {', '.join(files[:_SHOWN])}{more}" if files else name
