"""The shared libraries of CUDA and NCCL: which are here, and whether they can be loaded."""

from __future__ import annotations

from dataclasses import dataclass

from .probe import run_probe

CUDA_13 = {
    "libcudart.so.13": "nvidia-cuda-runtime", "libcublasLt.so.13": "nvidia-cublas", "libcublas.so.13": "nvidia-cublas",
    "libcurand.so.10": "nvidia-curand",
}
"""What ONNX Runtime's CUDA provider is linked with, and the packages that bring it; in the order of loading."""
NCCL = "libnccl.so.2"


@dataclass(frozen=True)
class Library:
    """A shared library.

    Attributes:
        name: that programs ask for.
        path: of the file, None when it is not there.
        problem: why it cannot be loaded, None when it can.
    """

    name: str
    path: str | None = None
    problem: str | None = None


def find_libraries() -> dict[str, Library]:
    """CUDA's and NCCL's, loaded in a process of its own."""
    names = (*CUDA_13, NCCL)
    found = run_probe("probe_libraries.py", *names)
    unknown = {"path": None, "problem": found.get("problem")}
    return {name: Library(name, **found.get(name, unknown)) for name in names}
