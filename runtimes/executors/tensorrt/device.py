"""Runs a plan on the GPU, through ``tensorrt_rtx`` or ``tensorrt``. Not run on hardware.

Both packages have the same runtime: deserialise, one execution context, addresses by tensor name. Inputs and outputs
have staging buffers that grow with the largest call; caches are read where they lie; the new keys and values go from
their staging buffers to the caches with strided copies on the same stream. Inputs that are on the device already, such
as weights or what another plan has made, are read where they lie, too.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import HerdError
from ..device_array import DeviceArray
from .cuda import Allocation, Cuda, DeviceBuffer, DeviceMemory
from .executor import Array, Call, Limits

PACKAGES = ("tensorrt_rtx", "tensorrt")
"""Python packages of the two products; the manifest's ``provider`` names one."""
_CACHE = re.compile(r"past\.(\d+)\.(key|value)")
_HIDDEN = "hidden."
_AXES = {"rows": ("logit_rows", 0), "image_tokens": ("image_features", 0), "tiles": ("pixel_values", 0)}
"""Where a dimension's size is read in an input; those of tokens in the ids, or in hidden states without them."""
_OF_CALLS = ("input_ids", "past_lengths", "logit_rows", "image_features", "pixel_values")
_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "FP8": "float8",
          "INT32": "int32", "INT64": "int64"}
"""TensorRT's names of types."""


class DeviceExecutor:
    """A plan on a GPU.

    Args:
        plan: the file.
        package: what ``load_package`` gave.
        cuda: the GPU.
        chunks: attention chunk of every layer of the plan, 0 for global ones.

    Raises:
        HerdError: the driver or the GPU is missing, or the plan is not for it.
    """

    def __init__(self, plan: Path, *, package: Any, cuda: Cuda, chunks: tuple[int, ...] = ()) -> None:
        self.trt, self.cuda = package, cuda
        self._logger = self.trt.Logger(self.trt.Logger.ERROR)
        self.engine = self._load(plan)
        self.context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self._outputs = [name for name in names if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.OUTPUT]
        self._inputs = [name for name in names if name not in self._outputs]
        self.takes_features = "image_features" in self._inputs
        pasts = [name for name in self._inputs if _CACHE.fullmatch(name)]
        itemsize = int(self.engine.get_tensor_dtype(pasts[0]).itemsize) if pasts else 1
        self.memory = DeviceMemory(self.cuda, itemsize)
        self.profiles = [self._limits(index, chunks) for index in range(self.engine.num_optimization_profiles)]
        self._staging: dict[str, Allocation] = {}
        self._profile = 0

    def run(self, call: Call) -> Array:
        """See ``Executor``."""
        return self.download(self.forward(call, {})["logits"])

    def forward(self, call: Call, given: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        """Put a call on the stream, new keys and values appended.

        Args:
            call: to run; inputs that the plan does not have are left out.
            given: inputs that are on the device, and places for outputs; what the plan does not have is left out.

        Returns:
            The outputs. What has no place of its own is overwritten by the next call.
        """
        self._select(call.profile)
        for name in self._inputs:
            if name in given:
                self._bind(name, given[name].shape, given[name].pointer)
            elif name in call.inputs:
                self._bind(name, call.inputs[name].shape, self.put(name, call.inputs[name]).pointer)
        for layer, buffers in enumerate(call.caches):
            for part, buffer in zip(("key", "value"), buffers, strict=True):
                self._bind(f"past.{layer}.{part}", buffer.shape, buffer.pointer)
        found = {name: self._stage_output(name, given.get(name)) for name in self._outputs}
        self._execute()
        for layer, (buffers, slots) in enumerate(zip(call.caches, call.first_slots, strict=True)):
            self._append(layer, buffers, list(slots), found)
        return found

    def run_simple(self, name: str, array: Array, output: str) -> Array:
        """One input in, one output out: the image plan."""
        self._bind(name, array.shape, self.put(name, np.ascontiguousarray(array)).pointer)
        found = self._stage_output(output)
        self._execute()
        return self.download(found)

    def set_communicator(self, capsule: Any) -> None:
        """Let the plan's collectives meet those of other ranks; waits until all of them have called it."""
        self._check(self.context.set_communicator(capsule), "communicator")

    @property
    def receives(self) -> str:
        """The input for hidden states [batch, tokens, width]; empty for plans that begin with tokens."""
        return next((name for name in self._inputs if name.startswith(_HIDDEN)), "")

    @property
    def hands_on(self) -> str:
        """The output with hidden states; empty for plans that end with logits."""
        return next((name for name in self._outputs if name.startswith(_HIDDEN)), "")

    @property
    def weights(self) -> list[str]:
        """Inputs that are weights, of plans that are made so."""
        return [name for name in self._inputs if name not in _OF_CALLS and not name.startswith((_HIDDEN, "past."))]

    def typed(self, name: str, shape: tuple[int, ...]) -> DeviceArray:
        """An array of a tensor's type that has no place yet."""
        return DeviceArray(0, shape, _TYPES[self.engine.get_tensor_dtype(name).name])

    def place(self, name: str, shape: tuple[int, ...]) -> DeviceArray:
        """Room for a tensor that somebody else may write."""
        wanted = self.typed(name, shape)
        return replace(wanted, pointer=self._staged(name, wanted.nbytes))

    def put(self, name: str, array: Array) -> DeviceArray:
        """A host array on the device, in the room that its name has."""
        pointer = self._staged(name, array.nbytes)
        self.cuda.upload(array, pointer)
        return DeviceArray(pointer, array.shape, array.dtype.name)

    def keep(self, name: str, array: Array) -> tuple[DeviceArray, Allocation]:
        """A weight in memory of its own.

        Raises:
            HerdError: it has another size than the plan says.
        """
        wanted = self.typed(name, tuple(self.engine.get_tensor_shape(name)))
        if array.nbytes != wanted.nbytes:
            raise HerdError(f"{name} has {array.nbytes} bytes, the plan takes {wanted.nbytes}, {list(wanted.shape)} of "
                            f"{wanted.dtype}: build the plan for layers of this kind")
        owner = self.cuda.allocate(array.nbytes)
        self.cuda.upload(array, owner.pointer)
        return replace(wanted, pointer=owner.pointer), owner

    def close(self) -> None:
        """Let go of what runs the plan, and works with a communicator; that has to live longer."""
        self.context = None

    def _append(
        self, layer: int, buffers: tuple[DeviceBuffer, DeviceBuffer], slots: list[int], found: dict[str, DeviceArray]
    ) -> None:
        for part, buffer in zip(("key", "value"), buffers, strict=True):
            new = found[f"new.{layer}.{part}"]
            self.memory.append(new.pointer, new.shape[2], buffer, slots)

    def _load(self, plan: Path) -> Any:
        runtime = self.trt.Runtime(self._logger)
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise HerdError(f"{plan} cannot be loaded by {self.trt.__name__} {self.trt.__version__} on a GPU of SM "
                            f"{self.cuda.compute_capability}: build it for this GPU and version")
        return engine

    def _limits(self, profile: int, chunks: tuple[int, ...]) -> Limits:
        ids = "input_ids" if "input_ids" in self._inputs else self.receives
        axes = {name: place for name, place in ({"batch": (ids, 0), "tokens": (ids, 1)} | _AXES).items()
                if place[0] in self._inputs}
        for layer, chunk in enumerate(chunks):
            axes["slots_local" if chunk else "slots_global"] = (f"past.{layer}.key", 2)
        limits = {}
        for name, (tensor, axis) in axes.items():
            low, _, high = self.engine.get_tensor_profile_shape(tensor, profile)
            limits[name] = (int(low[axis]), int(high[axis]))
        return limits

    def _select(self, profile: int) -> None:
        if profile != self._profile:
            self._check(self.context.set_optimization_profile_async(profile, int(self.cuda.stream)), "profile")
            self._profile = profile

    def _stage_output(self, name: str, place: DeviceArray | None = None) -> DeviceArray:
        found = place or self.place(name, tuple(self.context.get_tensor_shape(name)))
        self._set_address(name, found.pointer)
        return found

    def _staged(self, name: str, size: int) -> int:
        """The staging buffer of a tensor, at least so large."""
        if name not in self._staging or self._staging[name].bytes < size:
            self._staging[name] = self.cuda.allocate(size)
        return self._staging[name].pointer

    def _execute(self) -> None:
        self._check(self.context.execute_async_v3(int(self.cuda.stream)), "execution")

    def download(self, values: DeviceArray) -> Array:
        """Float32 values in the host's memory, as soon as they are there."""
        found = np.empty(values.shape, np.float32)
        self.cuda.download(values.pointer, found)
        return found

    def _bind(self, name: str, shape: tuple[int, ...], pointer: int) -> None:
        self._check(self.context.set_input_shape(name, tuple(shape)), f"shape {list(shape)} of {name}")
        self._set_address(name, pointer)

    def _set_address(self, name: str, pointer: int) -> None:
        self._check(self.context.set_tensor_address(name, pointer), f"address of {name}")

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
