"""Which targets and recipes run and build on a machine, and what the others need. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...runtimes.machine.cuda_checks import cuda_objections, driver_objection, gpu_objection
from ...runtimes.machine.machine import Machine
from ...runtimes.machine.onnxruntime_package import GPU_PACKAGE
from ...runtimes.machine.packages import importable
from .gpus import RTX_FP8_SM, RTX_SM
from .precision import PRECISIONS

_BF16_SM, _FP8_SM = 80, 89
"""First compute capabilities with products in bfloat16 and in FP8."""


@dataclass(frozen=True)
class Readiness:
    """A target with a recipe on a machine.

    Attributes:
        target: name.
        recipe: name.
        to_run: what keeps bundles of it from running, each with its cure; empty when they run.
        to_build: what keeps it from being built, likewise.
    """

    target: str
    recipe: str
    to_run: tuple[str, ...]
    to_build: tuple[str, ...]


def readiness(machine: Machine) -> list[Readiness]:
    """Every target with each of its recipes."""
    return [Readiness(target, recipe, tuple(_RUNNING[target](machine, recipe)),
                      (*machine.lacks("build"), *_BUILDING.get(target, _nothing)(machine, recipe)))
            for target, precision in PRECISIONS.items() for recipe in precision.recipes]


def _nothing(machine: Machine, recipe: str) -> list[str]:
    """Graphs that are run as they are: the packages of the extra ``build`` write them anywhere."""
    del machine, recipe
    return []


def _onnxruntime_on_cpu(machine: Machine, recipe: str) -> list[str]:
    """ONNX Runtime's CPU provider, which both of its packages have."""
    del recipe
    if machine.providers.works("CPUExecutionProvider"):
        package = machine.cuda.onnxruntime.package
        return machine.lacks("gpu" if package == GPU_PACKAGE else "cpu") if _is_old(machine) else []
    if machine.cuda.onnxruntime.directory is None:
        return ["onnxruntime is not installed: pip install 'herdgraph[cpu]'"]
    return [f"onnxruntime does not work ({machine.providers.problem}): pip install --force-reinstall 'herdgraph[cpu]'"]


def _is_old(machine: Machine) -> bool:
    """Whether the one onnxruntime that is here has a version outside of the range of its extra."""
    packages = machine.cuda.onnxruntime.installed
    return len(packages) == 1 and any(problem.startswith(f"{name} ") for name in packages
                                      for extra in ("cpu", "gpu") if extra in machine.extras
                                      for problem in machine.extras[extra].problems
                                      if not problem.endswith("is not installed"))


def _own_operators(machine: Machine, recipe: str) -> list[str]:
    """ONNX Runtime's CPU provider with our operators."""
    missing = machine.operators.problem
    if machine.operators.library is None:
        missing = ("herdgraph's own operators are not compiled here: install a wheel that has them, or run python -m "
                   "herdgraph.runtimes.native.compile, or use target cpu-stock")
    return [*_onnxruntime_on_cpu(machine, recipe), *([missing] if missing else [])]


def _cuda(machine: Machine, recipe: str) -> list[str]:
    """ONNX Runtime's CUDA provider on the first GPU."""
    found = [*cuda_objections(machine.cuda), *_arithmetic(machine, recipe)]
    broken = machine.providers.problems.get("CUDAExecutionProvider")
    return found or ([f"ONNX Runtime's CUDA provider does not work: {broken}"] if broken else [])


def _tensorrt_rtx(machine: Machine, recipe: str) -> list[str]:
    """Plans of TensorRT-RTX on the first GPU."""
    found = [*_gpu(machine), *machine.lacks("tensorrt-rtx")]
    known = RTX_FP8_SM if recipe == "fp8" else RTX_SM
    if (sm := _sm(machine)) and sm not in known:
        found.append(f"the GPU is SM {sm}, TensorRT-RTX compiles {recipe} for SM {', '.join(known)}: use target "
                     "tensorrt")
    return found


def _tensorrt(machine: Machine, recipe: str) -> list[str]:
    """Plans of TensorRT on the first GPU."""
    packages = machine.lacks("tensorrt")
    if not packages and not importable("tensorrt_libs"):
        packages = ["tensorrt has no libraries here, its packages on PyPI are placeholders: pip install 'herdgraph"
                    "[tensorrt]' with NVIDIA's index"]
    return [*_gpu(machine), *packages, *_arithmetic(machine, recipe)]


def _gpu(machine: Machine) -> list[str]:
    """A driver for CUDA 13 and a GPU, which whatever runs plans needs."""
    driver = machine.cuda.driver
    return [text for text in (driver_objection(driver), gpu_objection(driver)) if text]


def _arithmetic(machine: Machine, recipe: str) -> list[str]:
    """A GPU that is too old for the types of a recipe."""
    sm, least = _sm(machine), _FP8_SM if recipe == "fp8" else _BF16_SM
    if not sm or recipe == "fp32" or int(sm) >= least:
        return []
    return [f"the GPU is SM {sm}, {'FP8' if recipe == 'fp8' else 'bfloat16'} needs SM {least} or newer: use another"]


def _sm(machine: Machine) -> str:
    """Compute capability of the first GPU, empty without one."""
    gpus = machine.cuda.driver.gpus
    return gpus[0].sm if gpus else ""


def _rtx_packages(machine: Machine, recipe: str) -> list[str]:
    """TensorRT-RTX builds without a GPU."""
    del recipe
    return machine.lacks("tensorrt-rtx")


_RUNNING: dict[str, Callable[[Machine, str], list[str]]] = {
    "cpu": _own_operators, "cpu-stock": _onnxruntime_on_cpu, "canonical": _onnxruntime_on_cpu,
    "cuda": _cuda, "tensorrt-rtx": _tensorrt_rtx, "tensorrt": _tensorrt,
}
_BUILDING: dict[str, Callable[[Machine, str], list[str]]] = {"tensorrt-rtx": _rtx_packages, "tensorrt": _tensorrt}
"""Targets whose builds need more than the extra ``build``; TensorRT proper compiles on the GPU that will run it."""
