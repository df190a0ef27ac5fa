"""Step 0: the machine as ``herdgraph doctor`` sees it, and the GPU's two ceilings: bytes and operations per second."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import numpy as np

from .check import Check, Place, Report
from .graphs import Graph
from .session import Session


def run(place: Place, report: Report) -> None:
    """Facts first: they explain what fails later."""
    from herdgraph.runtimes.machine.cuda_checks import cuda_objections
    from herdgraph.runtimes.machine.machine import this_machine

    machine = this_machine()
    report.add(Check("machine", "passed", note=json.dumps(machine.to_json())))
    if place.timed:
        objections = cuda_objections(machine.cuda)
        report.holds("herdgraph doctor finds no objection to CUDA", not objections, "; ".join(objections))
    with report.attempt("2 x 3 on the device"):
        graph = Graph("fp32")
        factors = [graph.input(name, "fp32", [1, 1]) for name in "ab"]
        graph.output(graph.add("MatMul", *factors), "y", [1, 1])
        found = Session(graph.model(), place).result("y", a=np.full((1, 1), 2, np.float32),
                                                     b=np.full((1, 1), 3, np.float32))
        report.error("2 x 3 on the device", abs(found.item() - 6), 0, real=place.real)
    if place.timed:
        with report.attempt("ceilings"):
            _ceilings(place, report)


def _ceilings(place: Place, report: Report) -> None:
    """What PyTorch reaches on this GPU, where it is installed; in a process of its own, which then frees its memory."""
    try:
        done = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, check=False,
                              timeout=max(5.0, place.left))
    except subprocess.TimeoutExpired:
        report.skip("ceilings", "PyTorch took too long")
        return
    if done.returncode:
        report.skip("ceilings", f"no PyTorch for this GPU: {done.stderr.strip().splitlines()[-1:]}")
        return
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    report.measure("copy [TB/s]", found["copy"], f"PyTorch {found['torch']}, bytes read and written")
    report.measure("bf16 product [TFLOP/s]", found["product"], "8192 x 8192 x 8192, random numbers")


_TORCH = """
import json, statistics, torch
def seconds(run):
    for _ in range(3): run()
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(); run(); end.record(); torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda"); b = torch.empty_like(a)
copy = 2 * a.numel() / seconds(lambda: b.copy_(a)) / 1e12
del a, b
x, y = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
product = 2 * 8192**3 / seconds(lambda: x @ y) / 1e12
print(json.dumps({"torch": torch.__version__, "copy": copy, "product": product}))
"""


def memory_used() -> float:
    """Bytes that are in use on the first GPU, 0 where nvidia-smi is not there."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return 0.0
    done = subprocess.run([tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True,
                          text=True, check=False, timeout=20)
    return float(done.stdout.splitlines()[0]) * (1 << 20) if done.returncode == 0 and done.stdout else 0.0
