"""Sessions on the device that is checked, with inputs, caches and results bound to its memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from .check import Place
from .graphs import TYPES, Array

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class Session:
    """A model that is loaded.

    Args:
        model: serialized, or a file.
        place: says on which device.
        config: entries of the session's options.
        provider: options of the CUDA provider.
    """

    def __init__(
        self, model: bytes | Path, place: Place, config: Mapping[str, str] | None = None,
        provider: Mapping[str, str] | None = None,
    ) -> None:
        self.device = "cpu" if place.device == "cpu" else "cuda"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        for name, value in (config or {}).items():
            options.add_session_config_entry(name, value)
        name = CPU
        if self.device == "cuda":
            name = CUDA
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            _load_libraries(place)
        # The router is to be in float32 indeed.
        providers = [(name, {"use_tf32": "0", **(provider or {})})] if self.device == "cuda" else [name]
        source = model if isinstance(model, bytes) else str(model)
        self.session = onnxruntime.InferenceSession(source, options, providers=providers)
        if self.session.get_providers()[0] != name:
            raise RuntimeError(f"the session runs on {self.session.get_providers()[0]}, not on {name}")
        self.io = self.session.io_binding()
        self._kept: dict[str, Any] = {}
        self._caches: dict[str, tuple[str, Any]] = {}
        self._outputs: list[str] = []  # in the order in which they were bound, in which the binding has them

    def cache(self, name: str, result: str, shape: list[int], kind: str) -> None:
        """Memory of the device that an operator reads as one name and writes as another."""
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, TYPES[kind][0], self.device, 0)
        self._caches[name] = result, value
        self._bind_cache(name)

    def share_caches(self, other: Session) -> None:
        """Read and write the caches of another session."""
        self._caches |= other._caches
        for name in self._caches:
            self._bind_cache(name)

    def _bind_cache(self, name: str) -> None:
        result, value = self._caches[name]
        self.io.bind_ortvalue_input(name, value)
        self._bind_output(result, value)

    def _bind_output(self, name: str, value: Any = None) -> None:
        """A result goes to some memory, or to new memory of the host."""
        if value is None:
            self.io.bind_output(name, "cpu")
        else:
            self.io.bind_ortvalue_output(name, value)
        if name not in self._outputs:
            self._outputs.append(name)

    def bind(self, **arrays: Array) -> None:
        """Inputs, copied to where the graph wants them."""
        for name, array in arrays.items():
            self._kept[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            self.io.bind_ortvalue_input(name, self._kept[name])

    def fix(self, **arrays: Array) -> None:
        """Inputs at addresses of the device that do not change, as graph capture wants."""
        for name, array in arrays.items():
            self._kept[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)
            self.io.bind_ortvalue_input(name, self._kept[name])

    def update(self, **arrays: Array) -> None:
        """Other values for fixed inputs."""
        for name, array in arrays.items():
            self._kept[name].update_inplace(np.ascontiguousarray(array))

    def fix_output(self, name: str, shape: list[int]) -> None:
        """A float32 result at an address that does not change."""
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, TYPES["fp32"][0], self.device, 0)
        self._kept[name] = value
        self._bind_output(name, value)

    def run(self, options: Any = None) -> None:
        """Run on what is bound."""
        self.session.run_with_iobinding(self.io, options)

    def read(self, name: str) -> Array:
        """A fixed result."""
        return np.array(self._kept[name].numpy())

    def result(self, name: str, **arrays: Array) -> Array:
        """Bind, run, and read one result, which comes to the host."""
        self.bind(**arrays)
        self._bind_output(name)
        self.run()
        return np.array(self.io.get_outputs()[self._outputs.index(name)].numpy())

    def seconds(self, least: float = 0.5, most: int = 200) -> float:
        """Median seconds of a run, after three to warm up."""
        for _ in range(3):
            self.run()
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 5 or (time.perf_counter() - began < least and len(times) < most):
            started = time.perf_counter()
            self.run()
            times.append(time.perf_counter() - started)
        return float(np.median(times))


_loaded: list[bool] = []


def _load_libraries(place: Place) -> None:
    """CUDA's libraries out of pip's packages, once; a hollow device has its own."""
    if not _loaded and place.device == "cuda":
        onnxruntime.preload_dlls(cudnn=False)
    _loaded.append(True)
