"""Bundles of the target ``cuda`` where they cannot run: one line that says why, and never the CPU in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from herdgraph.errors import HerdError
from herdgraph.model.config.presets import SCOUT
from herdgraph.runtimes import Engine
from herdgraph.runtimes.executors.ort.cuda import session
from herdgraph.runtimes.executors.ort.cuda.memory import cache_budget, call_bytes
from herdgraph.runtimes.executors.ort.cuda.views import Place
from herdgraph.runtimes.machine import cuda_checks
from herdgraph.runtimes.machine.cuda_checks import CudaFacts
from herdgraph.runtimes.machine.driver import Driver, Gpu
from herdgraph.runtimes.machine.onnxruntime_package import OnnxRuntime


@pytest.fixture
def bundle(chunked_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that says that it is for CUDA."""
    shutil.copytree(chunked_bundle, tmp_path / "bundle")
    manifest = tmp_path / "bundle" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {
        "target": "cuda", "executor": "onnxruntime-cuda", "provider": "CUDAExecutionProvider"}))
    return tmp_path / "bundle"


def gpu(sm: str = "90") -> Driver:
    return Driver((13, 0), "580.1", (Gpu(0, "H100", sm, 80 << 30),))


WHEEL = OnnxRuntime({"onnxruntime-gpu": "1.31.1"}, "onnxruntime-gpu", "1.31.1", (13, 0), Path())


@pytest.mark.parametrize(("facts", "message"), [
    (CudaFacts(Driver(problem="no libcuda"), WHEEL), "there is no NVIDIA driver here"),
    (CudaFacts(Driver((12, 4), "550.1", gpu().gpus), WHEEL), r"the NVIDIA driver \(release 550.1\) speaks CUDA 12.4"),
    (CudaFacts(gpu("100"), WHEEL), r"cuda:0 \(H100\) is SM 100"),
    (CudaFacts(gpu(), OnnxRuntime({})), "onnxruntime-gpu is not installed"),
    (CudaFacts(gpu(), OnnxRuntime({"onnxruntime": "1.32"}, "onnxruntime", "1.32", None, Path())), "on CPUs only"),
])
def test_machines(facts: CudaFacts, message: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_checks, "find_cuda_facts", lambda: facts)
    with pytest.raises(HerdError, match=rf"^[^\n]*{message}[^\n]*$"):
        Engine.load(bundle, verify=False)


@pytest.mark.parametrize(("options", "message"), [
    ({"device": "gpu"}, r"device is 'gpu', [^\n]*cuda:0"), ({"device": "cuda:-1"}, "device is 'cuda:-1'"),
    ({"memory": "low"}, "memory is 'low'"), ({"gpu_memory": 0}, "gpu_memory is 0, it must be above 0"),
])
def test_options(options: dict[str, Any], message: str, bundle: Path) -> None:
    with pytest.raises(HerdError, match=rf"^{message}[^\n]*$"):
        Engine.load(bundle, verify=False, **options)


@pytest.mark.parametrize("options", [{"device": "cuda:0"}, {"gpu_memory": 1 << 30}])
def test_bundles_for_a_cpu_take_no_gpu(options: dict[str, Any], chunked_bundle: Path) -> None:
    with pytest.raises(HerdError, match=r"built for target 'cpu', which runs on a CPU and takes neither device nor"):
        Engine.load(chunked_bundle, verify=False, **options)


def test_a_session_that_fell_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fallen:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(session, "open_session", lambda *_: Fallen())
    with pytest.raises(HerdError, match=r"onnxruntime would run it on CPUExecutionProvider: `herdgraph doctor`"):
        session.cuda_session(Path("decoder.onnx"), Place(), records=True)


def test_an_onnxruntime_without_cuda(bundle: Path) -> None:
    """The one for CPUs, which these tests run with."""
    with pytest.raises(HerdError, match=r"is built for CUDAExecutionProvider, this onnxruntime [^\n]* has [^\n]*CPU"):
        session.cuda_session(bundle / "decoder.onnx", Place(), records=True)


def test_what_is_left_for_keys_and_values() -> None:
    calls = call_bytes(SCOUT.text)
    assert 1 << 30 < calls < 4 << 30
    assert cache_budget(70 << 30, 60 << 30, 2 << 30, None) == 8 << 30
    assert cache_budget(70 << 30, 60 << 30, 2 << 30, 1 << 30) == 1 << 30
    with pytest.raises(HerdError, match=r"cache_bytes is 9\.7 GB, 8\.6 GB of gpu_memory are left"):
        cache_budget(70 << 30, 60 << 30, 2 << 30, 9 << 30)
    with pytest.raises(HerdError, match=r"gpu_memory is [^\n]* leaves nothing for keys and values"):
        cache_budget(61 << 30, 60 << 30, 2 << 30, None)
