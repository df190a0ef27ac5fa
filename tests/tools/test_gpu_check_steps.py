"""Steps of the GPU check whose logic a CPU can run: the TensorRT runtime's copies, in the host's memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from gpu_check import device_memory, staging
from gpu_check.check import Check, Place, Report

from herdgraph.runtimes.executors.tensorrt import cuda
from support.host_tensorrt import host_gpu


class Listed(Report):
    """Keeps checks in the place of writing them down."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def add(self, check: Check) -> None:
        self.checks.append(check)


@pytest.mark.parametrize("step", [device_memory, staging], ids=["device_memory", "staging"])
def test_copies(step: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "Cuda", host_gpu)
    report = Listed()
    step.run(Place("cuda", tmp_path, time.monotonic() + 60), report)  # type: ignore[attr-defined]
    assert len(report.checks) >= 5
    assert {check.status for check in report.checks} == {"passed"}, report.checks
