"""The doctor command, on this machine and on machines that are not here."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from herdgraph.runtimes.machine import machine as module
from herdgraph.runtimes.machine.driver import Driver
from herdgraph.runtimes.machine.machine import Machine, Operators, this_machine
from herdgraph.runtimes.machine.onnxruntime_package import OnnxRuntime
from herdgraph.runtimes.machine.providers import Providers
from support.command_line import run
from support.fake_cuda import facts


@pytest.fixture(scope="module")
def here() -> Machine:
    """This machine, looked at once; it has no GPU."""
    return this_machine()


def _on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "this_machine", lambda: machine)


def test_this_machine(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    _on(here, monkeypatch)
    done = run("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    for said in ("processor", "CPUExecutionProvider", "works", "[build]", "cpu-stock     fp32, int8, int4, fp8",
                 "runs here, builds here"):
        assert said in done.stdout, said


def test_json_says_the_same(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    _on(here, monkeypatch)
    document = json.loads(run("doctor", "--json").stdout)
    rows = {(row["target"], row["recipe"]): row for row in document["targets"]}
    assert (rows["cpu-stock", "fp32"]["runs"], rows["cpu-stock", "fp32"]["to_run"]) == (True, [])
    assert document["providers"]["problems"]["CPUExecutionProvider"] is None
    assert document["cuda"]["onnxruntime"]["version"] == here.cuda.onnxruntime.version
    assert document["warnings"] == []


def test_a_gpu_is_shown(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    _on(replace(here, cuda=facts()), monkeypatch)
    out = run("doctor").stdout
    assert "release 580.159.04, CUDA 13.0" in out
    assert "NVIDIA H100, SM 90, 85.9 GB" in out
    assert "onnxruntime-gpu 1.31.1, built with CUDA 13.0" in out


def test_two_packages_over_one_another_are_a_warning(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    both = OnnxRuntime({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}, "onnxruntime", "1.32.0", None)
    _on(replace(here, cuda=facts(package=both)), monkeypatch)
    done = run("doctor")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in done.stderr


def test_a_machine_on_which_nothing_runs(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = replace(here, cuda=facts(Driver(problem="not there"), OnnxRuntime({})), operators=Operators(),
                   providers=Providers(problem="No module named 'onnxruntime'"))
    _on(bare, monkeypatch)
    done = run("doctor")
    assert done.returncode == 1
    assert done.stderr == ("error: no target runs on this machine: onnxruntime is not installed: pip install "
                           "'herdgraph[cpu]'\n")
    assert "does not run here" in done.stdout
    assert run("doctor", "--json").returncode == 1
