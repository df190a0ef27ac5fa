"""What runs and builds where: on a laptop, an edge box, servers with GPUs old and new, and with nothing installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from herdgraph.export.targets import readiness as module
from herdgraph.export.targets.precision import PRECISIONS, Precision
from herdgraph.export.targets.readiness import Readiness, readiness
from herdgraph.runtimes.machine.driver import Driver
from herdgraph.runtimes.machine.host import this_host
from herdgraph.runtimes.machine.machine import Machine, Operators
from herdgraph.runtimes.machine.onnxruntime_package import OnnxRuntime
from herdgraph.runtimes.machine.packages import Extra
from herdgraph.runtimes.machine.providers import Providers
from support.fake_cuda import CPU_PACKAGE, driver, facts

COMPLETE = {name: Extra(name, {}, ()) for name in ("cpu", "gpu", "build", "tensorrt-rtx", "tensorrt")}
NO_TORCH = COMPLETE | {"build": Extra("build", {}, ("torch is not installed",))}
LAPTOP = Machine(this_host(), facts(Driver(problem="not there"), CPU_PACKAGE),
                 Providers({"CPUExecutionProvider": None}), Operators(Path("/lib"), "avx2"), COMPLETE, {})
SERVER = replace(LAPTOP, cuda=facts(), providers=Providers(
    {"CUDAExecutionProvider": None, "CPUExecutionProvider": None}))


@pytest.fixture(autouse=True)
def _with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets of this version, and one for CUDA."""
    monkeypatch.setattr(module, "PRECISIONS", PRECISIONS | {"cuda": Precision(("bf16", "int4"))})


def _row(machine: Machine, target: str, recipe: str) -> Readiness:
    return next(row for row in readiness(machine) if (row.target, row.recipe) == (target, recipe))


def _running(machine: Machine) -> set[str]:
    return {row.target for row in readiness(machine) if not row.to_run}


def _building(machine: Machine) -> set[str]:
    return {row.target for row in readiness(machine) if not row.to_build}


def test_a_laptop_runs_and_builds_for_cpus_and_builds_for_gpus() -> None:
    assert _running(LAPTOP) == {"cpu", "cpu-stock", "canonical"}
    assert _building(LAPTOP) == {"cpu", "cpu-stock", "canonical", "cuda", "tensorrt-rtx"}
    assert [need.split(" (")[0] for need in _row(LAPTOP, "tensorrt-rtx", "fp8").to_run] == [
        "there is no NVIDIA driver here"]


def test_an_edge_box_builds_nothing() -> None:
    box = replace(LAPTOP, extras=NO_TORCH)
    assert (_running(box), _building(box)) == ({"cpu", "cpu-stock", "canonical"}, set())
    assert _row(box, "cpu", "int4").to_build == ("torch is not installed: pip install 'herdgraph[build]'",)


def test_without_our_operators_stock_bundles_run() -> None:
    found = replace(LAPTOP, operators=Operators())
    assert _running(found) == {"cpu-stock", "canonical"}
    assert "use target cpu-stock" in _row(found, "cpu", "int8").to_run[0]


def test_nothing_is_installed() -> None:
    found = replace(LAPTOP, cuda=facts(Driver(problem="not there"), OnnxRuntime({})),
                    providers=Providers(problem="No module named 'onnxruntime'"))
    assert _running(found) == set()
    assert _row(found, "cpu", "fp32").to_run == ("onnxruntime is not installed: pip install 'herdgraph[cpu]'",)


def test_an_onnxruntime_out_of_range_is_named() -> None:
    old = Extra("cpu", {"onnxruntime": "1.20.0"}, ("onnxruntime 1.20.0 is installed, >=1.24.1,<2 is needed",))
    found = replace(LAPTOP, extras=COMPLETE | {"cpu": old})
    assert _row(found, "cpu-stock", "fp32").to_run == (
        "onnxruntime 1.20.0 is installed, >=1.24.1,<2 is needed: pip install 'herdgraph[cpu]'",)


def test_a_server_with_hopper() -> None:
    assert {"cuda", "cpu"} <= _running(SERVER)
    assert "SM 90, TensorRT-RTX compiles fp8 for SM 89, 120, 121" in _row(SERVER, "tensorrt-rtx", "fp8").to_run[0]
    assert "no libraries here" in _row(SERVER, "tensorrt", "fp8").to_run[0]


def test_a_gpu_is_too_old_or_too_new() -> None:
    turing, blackwell = replace(SERVER, cuda=facts(driver("75"))), replace(SERVER, cuda=facts(driver("100")))
    assert _row(turing, "cuda", "bf16").to_run == ("the GPU is SM 75, bfloat16 needs SM 80 or newer: use another",)
    assert "has kernels for SM 75, 80, 86, 89, 90 and 120 only" in _row(blackwell, "cuda", "bf16").to_run[0]


def test_a_provider_that_does_not_compute_is_told() -> None:
    found = Providers({"CUDAExecutionProvider": "2 x 3 gave 0", "CPUExecutionProvider": None})
    broken = replace(SERVER, providers=found)
    assert _row(broken, "cuda", "int4").to_run == ("ONNX Runtime's CUDA provider does not work: 2 x 3 gave 0",)


def test_every_target_is_known() -> None:
    assert set(PRECISIONS) <= set(module._RUNNING)
