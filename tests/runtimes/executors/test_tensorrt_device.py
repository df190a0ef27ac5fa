"""The device's part of running plans, on imitations of CUDA and TensorRT that work in host memory.

What the real libraries do with these calls was not seen: there is no GPU here. What is tested is that the calls are the
right ones: addresses, pitches, shapes, profiles, and which bytes end up where.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from herdgraph.errors import HerdError
from herdgraph.export.passes import LowerExpertsDense
from herdgraph.runtimes.executors.tensorrt import PlanRunner, device
from herdgraph.runtimes.executors.tensorrt.cuda import Cuda, DeviceMemory
from herdgraph.runtimes.executors.tensorrt.device import DeviceExecutor
from support import herds, plans
from support.host_tensorrt import HostEngine, HostRuntime, Status, array_at, host_gpu, package
from support.plan_twin import DECODE, PREFILL, Twin

PROFILES = (DECODE | {"slots_local": (1, 16)}, PREFILL)


def _executor(engine: HostEngine | None, tmp_path: Path) -> DeviceExecutor:
    (tmp_path / "p.plan").write_bytes(b"plan")
    return DeviceExecutor(tmp_path / "p.plan", package=package(engine), cuda=host_gpu(), chunks=(16, 16, 16, 0))


def test_logits_and_caches_of_the_twin(tmp_path: Path) -> None:
    config = herds.variant()
    twin = Twin(plans.twin(config, LowerExpertsDense), PROFILES)
    engine = HostEngine.of(twin, PROFILES)
    executor = _executor(engine, tmp_path)
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
                np.testing.assert_allclose(array_at(buffer.pointer, buffer.shape, np.float32), array, atol=1e-5)
    assert engine.chosen == [1, 0], "profiles change between prompts and tokens only"


def test_memory_is_freed_with_its_buffers() -> None:
    gpu = host_gpu()
    memory = DeviceMemory(gpu, 2)
    buffer = memory.zeros((2, 3, 4, 8))
    row = memory.row(buffer, 1)
    assert (row.pointer - buffer.pointer, row.nbytes, buffer.nbytes) == (192, 192, 384)
    del buffer
    assert len(gpu.runtime.alive) == 1, "a row keeps the memory of its batch"
    del row
    assert not gpu.runtime.alive


def test_a_longer_buffer_takes_the_slots_of_a_shorter_one() -> None:
    memory = DeviceMemory(host_gpu(), 4)
    short, long = memory.zeros((1, 2, 3, 4)), memory.zeros((1, 2, 5, 4))
    values = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    memory.cuda.upload(values, short.pointer)
    memory.copy(short, long)
    found = array_at(long.pointer, long.shape, np.float32)
    np.testing.assert_array_equal(found[:, :, :3], values)
    assert not found[:, :, 3:].any()


def test_a_plan_for_another_gpu(tmp_path: Path) -> None:
    with pytest.raises(HerdError, match=r"cannot be loaded by tensorrt_rtx 1.7.1.116 on a GPU of SM 89: build it for"):
        _executor(None, tmp_path)


def test_errors_of_cuda_are_told() -> None:
    gpu = host_gpu()
    gpu.runtime.do_cudaMalloc = lambda _: (Status.cudaErrorInsufficientDriver, None)
    with pytest.raises(HerdError, match="cudaMalloc failed: cudaErrorInsufficientDriver"):
        gpu.allocate(8)


def test_without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(HerdError, match="cuda-bindings is not installed"):
        Cuda()
    for name, extra in (("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(HerdError, match=rf"{name} is not installed: pip install 'herdgraph\[{extra}\]'"):
            device.load_package(name)
    with pytest.raises(HerdError, match="provider is 'os', TensorRT has tensorrt_rtx and tensorrt: rebuild the bundle"):
        device.load_package("os")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=HostRuntime()))
    assert Cuda(3).compute_capability == "89"
    with pytest.raises(HerdError, match="GPU 4 was asked for, this machine has 4: start no more ranks than GPUs"):
        Cuda(4)


def test_a_stream_is_asked_whether_it_is_done() -> None:
    gpu = host_gpu()
    assert gpu.is_done()
    gpu.runtime.do_cudaStreamQuery = lambda _: (Status.cudaErrorNotReady,)
    assert not gpu.is_done()
    gpu.runtime.do_cudaStreamQuery = lambda _: (Status.cudaErrorInsufficientDriver,)
    with pytest.raises(HerdError, match="cudaStreamQuery failed: cudaErrorInsufficientDriver"):
        gpu.is_done()
