"""Imitations of CUDA and TensorRT in the host's memory, for runtimes whose GPU is not there.

A *plan* of these is a zip file of ONNX partitions, ``plan_of``; between them stand the collectives that a real plan has
inside. They go through whatever NCCL is loaded, with the communicator that the context was given.
"""

from __future__ import annotations

import ctypes
import io
import json
import zipfile
from collections.abc import Mapping
from collections.abc import Sequence as Items
from enum import Enum
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from herdgraph.runtimes.executors.tensorrt.cuda import Cuda

FP8 = 17
"""ONNX's number of FLOAT8E4M3FN."""
_TYPES = {
    "tensor(int64)": ("INT64", np.int64), "tensor(float)": ("FLOAT", np.float32),
    "tensor(float8e4m3fn)": ("FP8", np.uint8),
}
Limits = Mapping[str, Items[int]]
Status = Enum("Status", {"cudaSuccess": 0, "cudaErrorInsufficientDriver": 35, "cudaErrorNotReady": 600})


def array_at(pointer: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), dtype).reshape(shape)


class HostRuntime:
    """``cuda.bindings.runtime`` in host memory; everything is done at once."""

    cudaError_t = Status
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=8, cudaDevAttrComputeCapabilityMinor=9)

    def __init__(self) -> None:
        self.alive: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        return getattr(self, f"do_{name}")

    def do_cudaSetDevice(self, _device: int) -> tuple[Status]:  # noqa: N802
        return (Status.cudaSuccess,)

    def do_cudaGetDeviceCount(self) -> tuple[Status, int]:  # noqa: N802
        return Status.cudaSuccess, 4

    def do_cudaDeviceGetAttribute(self, attribute: int, _device: int) -> tuple[Status, int]:  # noqa: N802
        return Status.cudaSuccess, attribute

    def do_cudaStreamCreate(self) -> tuple[Status, int]:  # noqa: N802
        return Status.cudaSuccess, 7

    def do_cudaStreamSynchronize(self, _stream: int) -> tuple[Status]:  # noqa: N802
        return (Status.cudaSuccess,)

    def do_cudaStreamQuery(self, _stream: int) -> tuple[Status]:  # noqa: N802
        return (Status.cudaSuccess,)

    def do_cudaMalloc(self, size: int) -> tuple[Status, int]:  # noqa: N802
        block = ctypes.create_string_buffer(b"\xff" * size, size)
        self.alive[ctypes.addressof(block)] = block
        return Status.cudaSuccess, ctypes.addressof(block)

    def do_cudaFree(self, pointer: int) -> tuple[Status]:  # noqa: N802
        del self.alive[pointer]
        return (Status.cudaSuccess,)

    def do_cudaMemsetAsync(self, pointer: int, value: int, size: int, _stream: int) -> tuple[Status]:  # noqa: N802
        ctypes.memset(pointer, value, size)
        return (Status.cudaSuccess,)

    def do_cudaMemcpyAsync(self, to: int, source: int, size: int, _kind: int, _s: int) -> tuple[Status]:  # noqa: N802
        ctypes.memmove(to, source, size)
        return (Status.cudaSuccess,)

    def do_cudaMemcpy2DAsync(  # noqa: N802
        self, to: int, to_pitch: int, source: int, pitch: int, width: int, height: int, _kind: int, _stream: int
    ) -> tuple[Status]:
        assert width <= min(to_pitch, pitch) or height == 1, "CUDA refuses runs that overlap"
        for row in range(height):
            ctypes.memmove(to + row * to_pitch, source + row * pitch, width)
        return (Status.cudaSuccess,)

    def do_cudaGetErrorString(self, error: Status) -> tuple[Status, bytes]:  # noqa: N802
        return Status.cudaSuccess, error.name.encode()


class HostEngine:
    """A deserialised plan and its context: ONNX Runtime on arrays at addresses.

    Args:
        partitions: each a session, and the collectives behind it: operation, value, result.
        profiles: sizes by dimension, lowest and highest.
    """

    def __init__(self, partitions: Items[tuple[Any, Items[Items[str]]]], profiles: Items[Limits]) -> None:
        self.partitions, self.profiles = partitions, profiles
        self.num_optimization_profiles = len(profiles)
        made = {item.name for session, _ in partitions for item in session.get_outputs()}
        made |= {result for _, exchanges in partitions for _, _, result in exchanges}
        inputs = {item.name: item for session, _ in partitions for item in session.get_inputs()}
        self.inputs = {name: item for name, item in inputs.items() if name not in made}
        outputs = [item for session, _ in partitions for item in session.get_outputs()]
        self.outputs = {item.name: item for item in outputs if item.name.startswith(("new.", "hidden.", "logits"))}
        self.outputs |= {item.name.removesuffix("/part"): item for item in outputs if item.name == "logits/part"}
        self.outputs.pop("logits/part", None)
        self.tensors = self.inputs | self.outputs
        self.num_io_tensors = len(self.tensors)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.chosen: list[int] = []
        self.runs = 0
        self.communicator, self.width = 0, 1

    @classmethod
    def of(cls, twin: Any, profiles: Items[Limits]) -> HostEngine:
        """Of a twin's graph, which has no collectives."""
        return cls([(twin.session, [])], profiles)

    @classmethod
    def read(cls, plan: bytes) -> HostEngine:
        """Of a plan."""
        with zipfile.ZipFile(io.BytesIO(plan)) as archive:
            described = json.loads(archive.read("plan.json"))
            partitions = [(session_of(archive.read(str(index))), exchanges)
                          for index, exchanges in enumerate(described["exchanges"])]
        engine = cls(partitions, described["profiles"])
        engine.width = described["width"]
        return engine

    def create_execution_context(self) -> HostEngine:
        return self

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "output" if name in self.outputs else "input"

    def get_tensor_dtype(self, name: str) -> Any:
        kind, dtype = _TYPES[self.tensors[name].type]
        return SimpleNamespace(name=kind, itemsize=np.dtype(dtype).itemsize)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        limits, shape = self.profiles[profile], self.tensors[name].shape
        sizes = [limits.get(dim, (dim, dim)) if isinstance(dim, str) else (dim, dim) for dim in shape]
        return [[of[0] for of in sizes], [of[0] for of in sizes], [of[-1] for of in sizes]]

    def set_optimization_profile_async(self, profile: int, _stream: int) -> bool:
        self.chosen.append(profile)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert len(shape) == len(self.inputs[name].shape)
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return True

    def set_communicator(self, capsule: Any) -> bool:
        read = ctypes.pythonapi.PyCapsule_GetPointer
        read.argtypes, read.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
        self.communicator = read(capsule, None)
        word = np.zeros(1, np.float32)
        self._meet("all_reduce", word)  # as the real one, it waits for all
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """As declared, sizes filled in that are known from shapes of inputs; logits are those of all ranks."""
        if name in self.shapes:
            return self.shapes[name]
        known = {dim: size for given, shape in self.shapes.items()
                 for dim, size in zip(self.inputs[given].shape, shape, strict=True)}
        shape = tuple(known.get(dim, dim) for dim in self.tensors[name].shape)
        parts = self.tensors[name].name == "logits/part"
        return (*shape[:-1], shape[-1] * self.width) if parts else shape

    def execute_async_v3(self, _stream: int) -> bool:
        self.runs += 1
        try:
            self._execute()
        except ConnectionError:
            return False
        return True

    def _execute(self) -> None:
        values = {name: array_at(self.addresses[name], self.shapes[name], _TYPES[item.type][1]).copy()
                  for name, item in self.inputs.items()}
        for session, exchanges in self.partitions:
            values |= run(session, values)
            for operation, value, result in exchanges:
                values[result] = self._meet(operation, np.ascontiguousarray(values[value]))
        for name in self.outputs:
            array = np.ascontiguousarray(values[name])
            assert array.shape == self.get_tensor_shape(name)
            ctypes.memmove(self.addresses[name], array.ctypes.data, array.nbytes)

    def _meet(self, operation: str, value: np.ndarray) -> np.ndarray:
        nccl = ctypes.CDLL("libnccl.so.2")
        communicator, stream = ctypes.c_void_p(self.communicator), ctypes.c_void_p(7)
        place = ctypes.c_void_p(value.ctypes.data)
        parts = np.empty((self.width, *value.shape), np.float32)
        if operation == "all_reduce":
            status = nccl.ncclAllReduce(place, place, ctypes.c_size_t(value.size), 7, 0, communicator, stream)
        else:
            target = ctypes.c_void_p(parts.ctypes.data)
            status = nccl.ncclAllGather(place, target, ctypes.c_size_t(value.size), 7, communicator, stream)
        if status:
            raise ConnectionError(f"NCCL says {status}")
        return value if operation == "all_reduce" else np.concatenate(list(parts), -1)


def run(session: Any, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of a session by name."""
    binding = session.io_binding()
    for item in session.get_inputs():
        array = np.ascontiguousarray(values[item.name])
        if item.type == "tensor(float8e4m3fn)":
            binding.bind_ortvalue_input(
                item.name, onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, FP8))
        else:
            binding.bind_cpu_input(item.name, array)
    for item in session.get_outputs():
        binding.bind_output(item.name)
    session.run_with_iobinding(binding)
    return {item.name: value.numpy()
            for item, value in zip(session.get_outputs(), binding.get_outputs(), strict=True)}


def session_of(model: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def package(engine: HostEngine | None = None) -> SimpleNamespace:
    """The part of TensorRT that loads plans: those of ``plan_of``, or always one engine."""
    logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, _: None})
    return SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7.1.116", Logger=logger,
                           Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: engine),
                           TensorIOMode=SimpleNamespace(OUTPUT="output"))


def host_gpu() -> Cuda:
    """A GPU in the host's memory."""
    made = Cuda.__new__(Cuda)
    made.runtime, made.device = HostRuntime(), 0
    made.stream, made.compute_capability = 7, "89"
    return made
