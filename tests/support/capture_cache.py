"""Captured graphs are kept for the whole test run: a capture takes seconds, and many tests need the same ones.

A capture is a pure function of its configuration. It is kept in a folder that all workers of the run share; callers get
copies. ``tests/export/graph/test_capture.py`` tests capture itself, through ``uncached``.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path

import onnx
import onnx_ir as ir
from torch.onnx._internal.exporter._registration import ONNXRegistry

from herdgraph.export.graph import capture
from herdgraph.model.config import HerdConfig

Capture = Callable[[HerdConfig], ir.Model]
FOLDER = "HERDGRAPH_TEST_CAPTURES"
UNBOUND = "unbound"


def install() -> None:
    """Let everything that is imported from now on capture through the cache."""
    os.environ.setdefault(FOLDER, tempfile.mkdtemp(prefix="herdgraph-captures-"))
    for name in ("capture_decoder", "capture_vision"):
        setattr(capture, name, _cached(getattr(capture, name)))
    _keep_registry()


def uncached(function: Capture) -> Capture:
    """The capture itself."""
    return function.__wrapped__  # type: ignore[attr-defined, no-any-return]


def _keep_registry() -> None:
    """Let exporters share torch's table of operators, which none of them changes: each would make it in a second."""
    ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))


def _cached(function: Capture) -> Capture:
    @cache
    def loaded(config: HerdConfig) -> ir.Model:
        key = hashlib.sha256(f"{function.__name__} {config!r}".encode()).hexdigest()
        path = Path(os.environ[FOLDER]) / f"{key}.onnx"
        if not path.exists():
            _write(function(config), path)
        return _read(path)

    @wraps(function)
    def captured(config: HerdConfig) -> ir.Model:
        return loaded(config).clone()

    return captured


def _write(model: ir.Model, path: Path) -> None:
    """Write a graph whose weights are not bound: each is written as a reference to a file that does not exist."""
    for value in model.graph.initializers.values():
        if value.const_value is None:
            value.const_value = ir.ExternalTensor(UNBOUND, 0, 0, value.dtype, shape=value.shape, name=str(value.name))
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(ir.to_proto(model).SerializeToString())
    temporary.rename(path)


def _read(path: Path) -> ir.Model:
    model = ir.from_proto(onnx.ModelProto.FromString(path.read_bytes()))
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model
