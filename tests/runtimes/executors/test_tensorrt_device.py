"""The device's part of running plans, on imitations of CUDA and TensorRT that work in host memory.

What the real libraries do with these calls was not seen: there is no GPU here. What is tested is that the calls are the
right ones: addresses, pitches, shapes, profiles, and which bytes end up where.
"""

from __future__ import annotations

import ctypes
from enum import Enum
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from herdgraph.errors import HerdError
from herdgraph.export.passes import LowerExpertsDense
from herdgraph.runtimes.executors.tensorrt import PlanRunner, device
from herdgraph.runtimes.executors.tensorrt.cuda import Allocation, Cuda, DeviceMemory
from herdgraph.runtimes.executors.tensorrt.device import DeviceExecutor
from support import herds, plans
from support.plan_twin import DECODE, PREFILL, Twin

Status = Enum("Status", {"cudaSuccess": 0, "cudaErrorInsufficientDriver": 35})
PROFILES = (DECODE | {"slots_local": (1, 16)}, PREFILL)


def _array(pointer: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), dtype).reshape(shape)


class HostRuntime:
    """``cuda.bindings.runtime`` in host memory."""

    cudaError_t = Status
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=8, cudaDevAttrComputeCapabilityMinor=9)

    def __init__(self) -> None:
        self.alive: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self, f"do_{name}")

    def do_cudaSetDevice(self, _device: int) -> tuple[Status]:  # noqa: N802
        return (Status.cudaSuccess,)

    def do_cudaDeviceGetAttribute(self, attribute: int, _device: int) -> tuple[Status, int]:  # noqa: N802
        return Status.cudaSuccess, attribute

    def do_cudaStreamCreate(self) -> tuple[Status, int]:  # noqa: N802
        return Status.cudaSuccess, 7

    def do_cudaStreamSynchronize(self, _stream: int) -> tuple[Status]:  # noqa: N802
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


def _cuda() -> Cuda:
    cuda = Cuda.__new__(Cuda)
    cuda.runtime = HostRuntime()
    cuda.stream, cuda.compute_capability = 7, "89"
    return cuda


class HostEngine:
    """A deserialised plan and its context: a twin on ONNX Runtime that reads and writes at addresses."""

    def __init__(self, twin: Twin) -> None:
        self.session, self.profiles = twin.session, PROFILES
        self.num_optimization_profiles = len(PROFILES)
        self.tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors = len(self.tensors)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.chosen: list[int] = []

    def create_execution_context(self) -> HostEngine:
        return self

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index].name

    def get_tensor_mode(self, name: str) -> str:
        return "output" if any(item.name == name for item in self.session.get_outputs()) else "input"

    def get_tensor_dtype(self, name: str) -> np.dtype:
        kind = next(item.type for item in self.tensors if item.name == name)
        return np.dtype(np.int64 if kind == "tensor(int64)" else np.float32)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        item = next(item for item in self.tensors if item.name == name)
        sizes = [self.profiles[profile].get(dim, (dim, dim)) if isinstance(dim, str) else (dim, dim)
                 for dim in item.shape]
        return [[low for low, _ in sizes], [low for low, _ in sizes], [high for _, high in sizes]]

    def set_optimization_profile_async(self, profile: int, _stream: int) -> bool:
        self.chosen.append(profile)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch, tokens = self.shapes["input_ids"]
        if name == "logits":
            return batch, self.shapes["logit_rows"][0], 512
        return (batch, 2, tokens, 16) if name.startswith("new.") else self.shapes[name]

    def execute_async_v3(self, _stream: int) -> bool:
        feeds = {item.name: _array(self.addresses[item.name], self.shapes[item.name],
                                   self.get_tensor_dtype(item.name)).copy() for item in self.session.get_inputs()}
        names = [item.name for item in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(None, feeds), strict=True):
            assert array.shape == self.get_tensor_shape(name)
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return True


def _package(engine: HostEngine | None) -> SimpleNamespace:
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda _: engine)
    logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, _: None})
    return SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7.1.116", Logger=logger,
                           Runtime=lambda _: runtime, TensorIOMode=SimpleNamespace(OUTPUT="output"))


def _executor(engine: HostEngine | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DeviceExecutor:
    monkeypatch.setattr(device, "Cuda", lambda _: _cuda())
    (tmp_path / "p.plan").write_bytes(b"plan")
    return DeviceExecutor(tmp_path / "p.plan", package=_package(engine), chunks=(16, 16, 16, 0))


def test_logits_and_caches_of_the_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = herds.variant()
    twin = Twin(plans.twin(config, LowerExpertsDense), PROFILES)
    engine = HostEngine(twin)
    executor = _executor(engine, tmp_path, monkeypatch)
    assert executor.profiles == [{name: limits for name, limits in profile.items() if name != "image_tokens"}
                                 for profile in PROFILES]
    ours, theirs = PlanRunner(executor, config), PlanRunner(twin, config)
    pairs = [(ours.new_sequence(), theirs.new_sequence()) for _ in range(3)]
    none = np.zeros((0, 64), np.float32)
    for seed, (sequence, other) in enumerate(pairs):
        ids = herds.tokens(5 + 14 * seed, seed)
        np.testing.assert_allclose(ours.prefill(sequence, ids, none, all_positions=True),
                                   theirs.prefill(other, ids, none, all_positions=True), atol=1e-5)
    for step in range(4):
        tokens = herds.tokens(3, 50 + step)
        found = ours.decode_batch([sequence for sequence, _ in pairs], tokens)
        np.testing.assert_allclose(found, theirs.decode_batch([other for _, other in pairs], tokens), atol=1e-5)
    for sequence, other in [(sequence.fork(), other.fork()) for sequence, other in pairs]:
        np.testing.assert_allclose(ours.decode(sequence, 9), theirs.decode(other, 9), atol=1e-5)
        for buffers, arrays in zip(sequence.cache.layers, other.cache.layers, strict=True):
            for buffer, array in zip(buffers, arrays, strict=True):
                np.testing.assert_allclose(_array(buffer.pointer, buffer.shape, np.float32), array, atol=1e-5)
    assert engine.chosen == [1, 0], "profiles change between prompts and tokens only"


def test_memory_is_freed_with_its_buffers() -> None:
    cuda = _cuda()
    memory = DeviceMemory(cuda, 2)
    buffer = memory.zeros((2, 3, 4, 8))
    row = memory.row(buffer, 1)
    assert (row.pointer - buffer.pointer, row.nbytes, buffer.nbytes) == (192, 192, 384)
    del buffer
    assert len(cuda.runtime.alive) == 1, "a row keeps the memory of its batch"
    del row
    assert not cuda.runtime.alive


def test_a_longer_buffer_takes_the_slots_of_a_shorter_one() -> None:
    memory = DeviceMemory(_cuda(), 4)
    short, long = memory.zeros((1, 2, 3, 4)), memory.zeros((1, 2, 5, 4))
    values = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    memory.cuda.upload(values, short.pointer)
    memory.copy(short, long)
    found = _array(long.pointer, long.shape, np.float32)
    np.testing.assert_array_equal(found[:, :, :3], values)
    assert not found[:, :, 3:].any()


def test_a_plan_for_another_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HerdError, match=r"cannot be loaded by tensorrt_rtx 1.7.1.116 on a GPU of SM 89: build it for"):
        _executor(None, tmp_path, monkeypatch)


def test_errors_of_cuda_are_told() -> None:
    cuda = _cuda()
    cuda.runtime.do_cudaMalloc = lambda _: (Status.cudaErrorInsufficientDriver, None)
    with pytest.raises(HerdError, match="cudaMalloc failed: cudaErrorInsufficientDriver"):
        cuda.allocate(8)


def test_without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(HerdError, match="cuda-bindings is not installed"):
        Cuda()
    for name, extra in (("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx")):
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with pytest.raises(HerdError, match=rf"{name} is not installed: pip install 'herdgraph\[{extra}\]'"):
            device.load_package(name)
    with pytest.raises(HerdError, match="provider is 'os', TensorRT has tensorrt_rtx and tensorrt: rebuild the bundle"):
        device.load_package("os")


def test_weights_given_once_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = HostEngine(Twin(plans.twin(herds.variant(), LowerExpertsDense), PROFILES))
    executor = _executor(engine, tmp_path, monkeypatch)
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    executor._bind_weights({"w": weight})
    np.testing.assert_array_equal(_array(engine.addresses["w"], engine.shapes["w"], np.float32), weight)
    assert isinstance(executor._staging["w"], Allocation)


