"""Every reason why CUDA does not work is one line with its cure; a machine on which it works is let through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from herdgraph.errors import HerdError
from herdgraph.runtimes.machine.cuda_checks import CudaFacts, check_cuda, cuda_objections, has_kernels
from herdgraph.runtimes.machine.driver import Driver
from herdgraph.runtimes.machine.libraries import Library
from herdgraph.runtimes.machine.onnxruntime_package import OnnxRuntime
from support.fake_cuda import CPU_PACKAGE, GPU_PACKAGE, LIBRARIES, driver, facts

BOTH = OnnxRuntime({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}, "onnxruntime", "1.32.0", None, Path("/s"))
NO_CUBLAS = {**LIBRARIES, "libcublas.so.13": Library("libcublas.so.13", None, "cannot open shared object file")}

REFUSED = {
    "no driver": (facts(Driver(problem="libcuda.so.1: cannot open shared object file")), 0,
                  "there is no NVIDIA driver here (libcuda.so.1: cannot open shared object file): install release 580"),
    "no GPU": (facts(Driver((13, 0), problem="cuInit failed: no CUDA-capable device is detected (100)")), 0,
               "the NVIDIA driver finds no GPU (cuInit failed: no CUDA-capable device is detected (100)): see"),
    "too few GPUs": (facts(driver(gpus=2)), 2, "there is no cuda:2: the NVIDIA driver sees 2 GPUs"),
    "an old driver": (facts(driver(cuda=(12, 8))), 0,
                      "the NVIDIA driver (release 580.159.04) speaks CUDA 12.8, CUDA 13.0 is needed: update it"),
    "no kernels": (facts(driver("100")), 0,
                   "cuda:0 (NVIDIA H100) is SM 100, onnxruntime-gpu 1.31.1 of PyPI has kernels for SM 75, 80, 86, 89, "
                   "90 and 120 only: use another GPU"),
    "no package": (facts(package=OnnxRuntime({})), 0,
                   "onnxruntime-gpu is not installed: pip install 'herdgraph[gpu]'"),
    "the package for CPUs": (facts(package=CPU_PACKAGE), 0,
                             "onnxruntime 1.32.0 is installed, which computes on CPUs only, onnxruntime-gpu is needed: "
                             "pip uninstall -y onnxruntime, then pip install 'herdgraph[gpu]'"),
    "both packages": (facts(package=BOTH), 0,
                      "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed and overwrite each other's "
                      "files, those of onnxruntime are there now: pip uninstall -y onnxruntime onnxruntime-gpu"),
    "no cuBLAS": (facts(libraries=NO_CUBLAS), 0,
                  "libcublas.so.13 of nvidia-cublas cannot be loaded (cannot open shared object file): pip install"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str) -> None:
    found, device, message = REFUSED[case]
    with pytest.raises(HerdError) as error:
        check_cuda(device, found)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("sm", ["75", "80", "86", "87", "89", "90", "120"])
def test_gpus_with_kernels_are_taken(sm: str) -> None:
    assert check_cuda(0, facts(driver(sm))).sm == sm


@pytest.mark.parametrize("sm", ["61", "70", "100", "103", "110", "121"])
def test_gpus_without_kernels(sm: str) -> None:
    """The kernels for SM 90 and 120 are for exactly these, and there is nothing to compile for others."""
    assert not has_kernels(sm)


def test_the_package_says_which_cuda_it_needs() -> None:
    """A driver for CUDA 12 is old for wheels of CUDA 13 and new enough for those of CUDA 12 from another index."""
    found = facts(driver(cuda=(12, 8)), replace(GPU_PACKAGE, cuda=(12, 8)))
    assert cuda_objections(found) == []


def test_all_objections_are_listed() -> None:
    """Packages are looked at on a machine without a driver, too; libraries only where their package is."""
    found = cuda_objections(CudaFacts(Driver(problem="not there"), OnnxRuntime({})))
    assert [text.split(":")[0] for text in found] == ["there is no NVIDIA driver here (not there)",
                                                      "onnxruntime-gpu is not installed"]
