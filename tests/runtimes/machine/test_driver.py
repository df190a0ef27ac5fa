"""The NVIDIA driver is asked through its library: a fake one, compiled here, that answers, refuses or crashes."""

from __future__ import annotations

from pathlib import Path

import pytest

from herdgraph.runtimes.machine import probe
from herdgraph.runtimes.machine.driver import Gpu, find_driver
from support.fake_cuda import compile_libcuda


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_libcuda(tmp_path_factory.mktemp("libcuda"))


@pytest.fixture
def fake(library: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    return monkeypatch


def test_gpus_are_found(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("FAKE_GPUS", "2")
    fake.setenv("FAKE_SM", "120")
    found = find_driver()
    assert (found.cuda, found.problem) == ((13, 0), None)
    assert found.gpus == tuple(Gpu(index, "NVIDIA H100", "120", 80 << 30) for index in range(2))


def test_a_driver_without_a_gpu_says_so(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("FAKE_INIT", "100")
    found = find_driver()
    assert (found.cuda, found.gpus) == ((13, 0), ())
    assert found.problem == "cuInit failed: no CUDA-capable device is detected (100)"


def test_an_old_driver_tells_its_version(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("FAKE_CUDA", "12040")
    assert find_driver().cuda == (12, 4)


def test_a_driver_that_crashes_ends_the_probe_alone(fake: pytest.MonkeyPatch) -> None:
    fake.setenv("FAKE_CRASH", "1")
    assert find_driver().problem == "crashed (SIGABRT)"


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("no library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    found = find_driver()
    assert (found.cuda, found.gpus) == (None, ())
    assert "libcuda.so.1" in str(found.problem)


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(probe, "__file__", str(tmp_path / "probe.py"))
    assert probe.run_probe("hangs.py", seconds=0.3) == {"problem": "no answer within 0 seconds"}


def test_a_probe_that_raises_says_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text("raise ImportError('libfoo.so.3: cannot open shared object file')")
    monkeypatch.setattr(probe, "__file__", str(tmp_path / "probe.py"))
    assert probe.run_probe("raises.py")["problem"] == "ImportError: libfoo.so.3: cannot open shared object file"
