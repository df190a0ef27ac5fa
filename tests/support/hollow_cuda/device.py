"""A hollow CUDA device: ONNX Runtime's CUDA provider over libraries that answer like a driver and compute nothing.

``run`` loads a graph in a process of its own and returns what happened on the device, call by call. Nothing that
is computed means anything; docs/hollow-device.md says what that proves.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from .libraries import UnavailableError, build
from .report import Report, reports

PYTHON_VARIABLE = "HERDGRAPH_CUDA_PYTHON"
LONGEST, REFUSED = 600, 3
"""Seconds that a process may take, and its status when ONNX Runtime refuses."""
ROOT = Path(__file__).resolve().parents[3]
_FIND = """
import importlib.util, importlib.metadata
from pathlib import Path
package = Path(importlib.util.find_spec("onnxruntime").origin).parent
print(package / "capi" / "libonnxruntime_providers_cuda.so")
print(importlib.metadata.distribution("nvidia-cuda-runtime").locate_file("nvidia/cu13/include"))
"""


@dataclass(frozen=True)
class Call:
    """One call of a decoder, given often enough that the device has settled.

    Attributes:
        name: in the report.
        dims: sizes of symbolic dimensions.
        values: of inputs that are read on the host or that must make sense; other inputs are not initialized.
        record: whether it is also recorded as a CUDA graph and replayed.
    """

    name: str
    dims: dict[str, int]
    values: dict[str, list[int] | list[list[int]]] = field(default_factory=dict)
    record: bool = False


class RefusedError(Exception):
    """What ONNX Runtime says of a graph that does not run on the device."""


@cache
def hollow_device() -> tuple[Path, Path]:
    """A Python that has onnxruntime-gpu, and the libraries for it.

    Raises:
        UnavailableError: either is missing.
    """
    python = Path(os.environ.get(PYTHON_VARIABLE, ROOT / ".venv-cuda" / "bin" / "python"))
    if not python.exists():
        raise UnavailableError(f"no {python}: `make test-cuda` makes it, or set {PYTHON_VARIABLE}")
    found = subprocess.run([python, "-c", _FIND], capture_output=True, text=True, check=False)
    if found.returncode:
        raise UnavailableError(f"{python} lacks onnxruntime-gpu or nvidia-cuda-runtime")
    provider, include = map(Path, found.stdout.split("\n")[:2])
    if not provider.exists() or not (include / "cuda_runtime_api.h").exists():
        raise UnavailableError(f"{python} has no CUDA provider, or no headers of CUDA 13")
    return python, build(provider, include)


def run(
    calls: list[Call], *models: str, session: dict[str, str] | None = None, provider: dict[str, str] | None = None,
    generation: int = 90,
) -> dict[str, Report]:
    """What happens on the device, by ``CALL/PHASE``, and ``load``; of several graphs together.

    Phases of a call are ``first``, ``eager`` and, if it is recorded, ``record`` and ``replay``.

    Args:
        calls: one after the other, on one session.
        models: paths of graphs. All of them get the calls, one graph after the other.
        session: entries of the session's configuration.
        provider: options of the CUDA provider.
        generation: compute capability of the device, times ten.

    Raises:
        RefusedError: ONNX Runtime does not take the graph, or a call of it.
        UnavailableError: there is no hollow device here.
    """
    python, libraries = hollow_device()
    job = {"models": models, "calls": [asdict(call) for call in calls], "session": session or {},
           "provider": provider or {}}
    with tempfile.TemporaryDirectory() as scratch:
        description, log = Path(scratch, "job.json"), Path(scratch, "log")
        description.write_text(json.dumps(job))
        told = {"HOLLOW_CUDA_LOG": str(log), "HOLLOW_CUDA_SM": str(generation)}
        done = subprocess.run(
            [python, Path(__file__).with_name("worker.py"), libraries, description], capture_output=True, text=True,
            check=False, timeout=LONGEST, env=os.environ | told)
        if done.returncode == REFUSED:
            raise RefusedError(done.stdout.strip().split("\n")[-1])
        if done.returncode:
            raise RuntimeError(f"the hollow device's process ended with {done.returncode}:\n{done.stderr}")
        return reports(log)
