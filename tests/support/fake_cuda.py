"""A libcuda that answers what the environment tells it to, compiled on the spot; and facts of other machines."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from herdgraph.runtimes.machine.cuda_checks import CudaFacts
from herdgraph.runtimes.machine.driver import Driver, Gpu
from herdgraph.runtimes.machine.libraries import CUDA_13, Library
from herdgraph.runtimes.machine.onnxruntime_package import OnnxRuntime

SOURCE = r"""
#include <stdlib.h>
#include <string.h>
static int number(const char* name, int other) { const char* t = getenv(name); return t ? atoi(t) : other; }
int cuDriverGetVersion(int* v) { if (getenv("FAKE_CRASH")) abort(); *v = number("FAKE_CUDA", 13000); return 0; }
int cuInit(unsigned f) { return number("FAKE_INIT", 0); }
int cuDeviceGetCount(int* n) { *n = number("FAKE_GPUS", 1); return 0; }
int cuDeviceGet(int* d, int i) { *d = i; return 0; }
int cuDeviceGetName(char* s, int n, int d) { strncpy(s, "NVIDIA H100", n); return 0; }
int cuDeviceTotalMem_v2(size_t* m, int d) { *m = 80ull << 30; return 0; }
int cuDeviceGetAttribute(int* v, int a, int d) { int sm = number("FAKE_SM", 90); *v = a == 75 ? sm / 10 : sm % 10;
  return 0; }
int cuGetErrorString(int e, const char** s) { *s = e == 100 ? "no CUDA-capable device is detected" : "?"; return 0; }
"""

GPU_PACKAGE = OnnxRuntime({"onnxruntime-gpu": "1.31.1"}, "onnxruntime-gpu", "1.31.1", (13, 0), Path("/site"))
CPU_PACKAGE = OnnxRuntime({"onnxruntime": "1.32.0"}, "onnxruntime", "1.32.0", None, Path("/site"))
LIBRARIES = {name: Library(name, f"/site/{name}") for name in CUDA_13}


def compile_libcuda(directory: Path) -> Path:
    """The library in a directory, for ``LD_LIBRARY_PATH``; the test is skipped without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler for the fake libcuda")
    (directory / "cuda.c").write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", directory / "libcuda.so.1", directory / "cuda.c"], check=True)
    return directory


def driver(sm: str = "90", gpus: int = 1, cuda: tuple[int, int] = (13, 0)) -> Driver:
    """A driver with GPUs of one kind."""
    return Driver(cuda, "580.159.04", tuple(Gpu(index, "NVIDIA H100", sm, 80 << 30) for index in range(gpus)))


def facts(
    found: Driver | None = None, package: OnnxRuntime = GPU_PACKAGE, libraries: dict[str, Library] | None = None
) -> CudaFacts:
    """Facts of a machine on which CUDA works, but for what is given."""
    return CudaFacts(found or driver(), package, LIBRARIES if libraries is None else libraries)
