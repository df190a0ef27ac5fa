"""The device itself: it remembers, and refuses what a driver refuses."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from textwrap import dedent

import pytest

from support.hollow_cuda.device import hollow_device
from support.hollow_cuda.report import Event

CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, OUT_OF_MEMORY, INVALID_CONFIGURATION = 900, 901, 2, 9


def run(tmp_path: Path, code: str) -> tuple[list[int], list[Event]]:
    """Codes that calls of the hollow runtime return, one printed each, and what it wrote down."""
    python, libraries = hollow_device()
    log = tmp_path / "log"
    prologue = f"""
        from ctypes import CDLL, Structure, byref, c_char_p, c_size_t, c_uint, c_void_p
        rt = CDLL("{libraries}/libcudart.so.13")
        stream, device, host, graph = c_void_p(), c_void_p(), c_void_p(), c_void_p()
        rt.cudaStreamCreate(byref(stream))
        size = lambda n: c_size_t(n)
    """
    done = subprocess.run([python, "-c", dedent(prologue) + dedent(code)], capture_output=True, text=True, check=True,
                          env=os.environ | {"HOLLOW_CUDA_LOG": str(log)})
    return [int(line) for line in done.stdout.split()], [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("refused", [
    "rt.cudaMalloc(byref(host), size(8))", "rt.cudaFree(device)", "rt.cudaHostAlloc(byref(host), size(8), 0)",
    "rt.cudaStreamSynchronize(stream)", "rt.cudaDeviceSynchronize()", "rt.cudaEventSynchronize(stream)",
    "rt.cudaMemcpy(device, device, size(8), 3)", "rt.cudaMemcpyAsync(pinned, device, size(8), 2, stream)",
    "rt.cudaMemcpyAsync(device, pageable, size(8), 1, stream)", "rt.cudaMemset(device, 0, size(8))",
    "rt.cudaMemsetAsync(device, 0, size(8), None)",
])
def test_recording_refuses_what_cannot_be_replayed(tmp_path: Path, refused: str) -> None:
    codes, events = run(tmp_path, f"""
        from ctypes import create_string_buffer
        pinned, pageable = c_void_p(), create_string_buffer(8)
        rt.cudaMalloc(byref(device), size(64))
        rt.cudaMallocHost(byref(pinned), size(64))
        rt.cudaStreamBeginCapture(stream, 0)
        print({refused})
        print(rt.cudaStreamEndCapture(stream, byref(graph)))
    """)
    assert codes == [CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED]
    assert events[-1]["event"] == "refused"


def test_recorded_graph_knows_its_steps(tmp_path: Path) -> None:
    codes, events = run(tmp_path, """
        pinned = c_void_p()
        rt.cudaMalloc(byref(device), size(64))
        rt.cudaMallocHost(byref(pinned), size(64))
        rt.cudaStreamBeginCapture(stream, 0)
        print(rt.cudaMemsetAsync(device, 0, size(8), stream))
        print(rt.cudaMemcpyAsync(device, pinned, size(8), 1, stream))
        print(rt.cudaStreamEndCapture(stream, byref(graph)))
        rt.cudaGraphInstantiate(byref(host), graph, 0)
        print(rt.cudaGraphLaunch(host, stream))
    """)
    assert codes == [0, 0, 0, 0]
    assert events[-1] == {"event": "replay", "steps": 2, "exchanges": 0}


def test_copies_are_told_by_address(tmp_path: Path) -> None:
    _, events = run(tmp_path, """
        from ctypes import create_string_buffer
        text, back = create_string_buffer(b"herd"), create_string_buffer(5)
        rt.cudaMalloc(byref(device), size(64))
        rt.cudaMemcpy(device, text, size(5), 4)
        rt.cudaMemcpy(back, device, size(5), 4)
        assert back.value == b"herd"
    """)
    assert [(event["from"], event["to"]) for event in events if event["event"] == "copy"] == [
        ("host", "device"), ("device", "host")]


def test_memory_ends_at_80_gib_and_is_not_touched(tmp_path: Path) -> None:
    codes, _ = run(tmp_path, """
        import resource
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(rt.cudaMalloc(byref(device), size(60 << 30)))
        print(rt.cudaMemset(device, 1, size(60 << 30)))
        print(rt.cudaMalloc(byref(host), size(30 << 30)))
        rt.cudaFree(device)
        print(rt.cudaMalloc(byref(host), size(30 << 30)))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10000
    """)
    assert codes == [0, 0, OUT_OF_MEMORY, 0]


@pytest.mark.parametrize(("grid", "block", "shared", "code"), [
    ((1, 1, 1), (1024, 1, 1), 48 << 10, 0), ((0, 1, 1), (32, 1, 1), 0, INVALID_CONFIGURATION),
    ((1, 65536, 1), (32, 1, 1), 0, INVALID_CONFIGURATION), ((1, 1, 1), (512, 4, 1), 0, INVALID_CONFIGURATION),
    ((1, 1, 1), (32, 1, 1), 200 << 10, INVALID_CONFIGURATION),
])
def test_launches_that_no_gpu_takes(
    tmp_path: Path, grid: tuple[int, ...], block: tuple[int, ...], shared: int, code: int,
) -> None:
    codes, events = run(tmp_path, f"""
        class Dim3(Structure):
            _fields_ = [(name, c_uint) for name in "xyz"]
        stub = c_void_p(0x1000)
        rt.__getattr__("__cudaRegisterFunction")(None, stub, None, c_char_p(b"kernel"), -1, *[None] * 5)
        print(rt.cudaLaunchKernel(stub, Dim3(*{grid}), Dim3(*{block}), None, size({shared}), stream))
    """)
    assert codes == [code]
    assert events[-1]["event"] == ("refused" if code else "launch")
