"""Runs a plan on the GPU, through ``tensorrt_rtx`` or ``tensorrt``. Not run on hardware.

Both packages have the same runtime: deserialise, one execution context, addresses by tensor name. Inputs and outputs
have staging buffers that grow with the largest call; caches are read where they lie; the new keys and values go from
their staging buffers to the caches with strided copies on the same stream.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import HerdError
from .cuda import Allocation, Cuda, DeviceBuffer, DeviceMemory
from .executor import Array, Call, Limits

PACKAGES = ("tensorrt_rtx", "tensorrt")
"""Python packages of the two products; the manifest's ``provider`` names one."""
_CACHE = re.compile(r"past\.(\d+)\.(key|value)")
_AXES = {"batch": ("input_ids", 0), "tokens": ("input_ids", 1), "rows": ("logit_rows", 0),
         "image_tokens": ("image_features", 0), "tiles": ("pixel_values", 0)}
"""Where a dimension's size is read in an input."""


class DeviceExecutor:
    """A plan on a GPU.

    Args:
        plan: the file.
        package: what ``load_package`` gave.
        chunks: attention chunk of every layer, 0 for global ones.
        weights: host arrays for plans whose weights are inputs; uploaded once.
        device: index of the GPU.

    Raises:
        HerdError: the driver or the GPU is missing, or the plan is not for it.
    """

    def __init__(
        self, plan: Path, *, package: Any, chunks: tuple[int, ...] = (), weights: Mapping[str, Array] | None = None,
        device: int = 0,
    ) -> None:
        self.trt = package
        self.cuda = Cuda(device)
        self._logger = self.trt.Logger(self.trt.Logger.ERROR)
        self.engine = self._load(plan)
        self.context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self._outputs = [name for name in names if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.OUTPUT]
        self._inputs = [name for name in names if name not in self._outputs]
        self.takes_features = "image_features" in self._inputs
        pasts = [name for name in self._inputs if _CACHE.fullmatch(name)]
        self.memory = DeviceMemory(self.cuda, self._itemsize(pasts[0]) if pasts else 1)
        self.profiles = [self._limits(index, chunks) for index in range(self.engine.num_optimization_profiles)]
        self._staging: dict[str, Allocation] = {}
        self._profile = 0
        self._bind_weights(weights or {})

    def run(self, call: Call) -> Array:
        """See ``Executor``."""
        self._select(call.profile)
        for name, array in call.inputs.items():
            self._stage_input(name, array)
        for layer, buffers in enumerate(call.caches):
            for part, buffer in zip(("key", "value"), buffers, strict=True):
                self._set_shape(f"past.{layer}.{part}", buffer.shape)
                self._set_address(f"past.{layer}.{part}", buffer.pointer)
        new = {name: self._stage_output(name) for name in self._outputs}
        self._execute()
        tokens = call.inputs["input_ids"].shape[1]
        for layer, (buffers, slots) in enumerate(zip(call.caches, call.first_slots, strict=True)):
            self._append(layer, buffers, tokens, list(slots), new)
        return self._download("logits", new["logits"])

    def run_simple(self, name: str, array: Array, output: str) -> Array:
        """One input in, one output out: the image plan."""
        self._stage_input(name, np.ascontiguousarray(array))
        pointer = self._stage_output(output)
        self._execute()
        return self._download(output, pointer)

    def _append(
        self, layer: int, buffers: tuple[DeviceBuffer, DeviceBuffer], tokens: int, slots: list[int], new: dict[str, int]
    ) -> None:
        for part, buffer in zip(("key", "value"), buffers, strict=True):
            self.memory.append(new[f"new.{layer}.{part}"], tokens, buffer, slots)

    def _load(self, plan: Path) -> Any:
        runtime = self.trt.Runtime(self._logger)
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise HerdError(f"{plan} cannot be loaded by {self.trt.__name__} {self.trt.__version__} on a GPU of SM "
                            f"{self.cuda.compute_capability}: build it for this GPU and version")
        return engine

    def _limits(self, profile: int, chunks: tuple[int, ...]) -> Limits:
        axes = {name: place for name, place in _AXES.items() if place[0] in self._inputs}
        for layer, chunk in enumerate(chunks):
            axes["slots_local" if chunk else "slots_global"] = (f"past.{layer}.key", 2)
        limits = {}
        for name, (tensor, axis) in axes.items():
            low, _, high = self.engine.get_tensor_profile_shape(tensor, profile)
            limits[name] = (int(low[axis]), int(high[axis]))
        return limits

    def _bind_weights(self, weights: Mapping[str, Array]) -> None:
        for name, array in weights.items():
            self._stage_input(name, np.ascontiguousarray(array))

    def _select(self, profile: int) -> None:
        if profile != self._profile:
            self._check(self.context.set_optimization_profile_async(profile, int(self.cuda.stream)), "profile")
            self._profile = profile

    def _stage_input(self, name: str, array: Array) -> None:
        pointer = self._staged(name, array.nbytes)
        self.cuda.upload(array, pointer)
        self._set_shape(name, array.shape)
        self._set_address(name, pointer)

    def _stage_output(self, name: str) -> int:
        size = prod(self.context.get_tensor_shape(name)) * self._itemsize(name)
        pointer = self._staged(name, size)
        self._set_address(name, pointer)
        return pointer

    def _staged(self, name: str, size: int) -> int:
        """The staging buffer of a tensor, at least so large."""
        if name not in self._staging or self._staging[name].bytes < size:
            self._staging[name] = self.cuda.allocate(size)
        return self._staging[name].pointer

    def _execute(self) -> None:
        self._check(self.context.execute_async_v3(int(self.cuda.stream)), "execution")

    def _download(self, name: str, pointer: int) -> Array:
        found = np.empty(tuple(self.context.get_tensor_shape(name)), np.float32)
        self.cuda.download(pointer, found)
        return found

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._check(self.context.set_input_shape(name, tuple(shape)), f"shape {list(shape)} of {name}")

    def _set_address(self, name: str, pointer: int) -> None:
        self._check(self.context.set_tensor_address(name, pointer), f"address of {name}")

    def _itemsize(self, name: str) -> int:
        return int(self.engine.get_tensor_dtype(name).itemsize)

    @staticmethod
    def _check(done: bool, what: str) -> None:
        if not done:
            raise HerdError(f"TensorRT refused the {what}: report this as a defect")


def load_package(name: str) -> Any:
    """A TensorRT package.

    Raises:
        HerdError: it is not installed, or no package of TensorRT.
    """
    if name not in PACKAGES:
        raise HerdError(f"the bundle's provider is {name!r}, TensorRT has {' and '.join(PACKAGES)}: rebuild the bundle")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = name.replace("_", "-")
        raise HerdError(f"{name} is not installed: pip install 'herdgraph[{extra}]'") from error
