"""Target ``tensorrt``: plans for the GPU at hand, through the ``tensorrt`` package. Not run on hardware.

TensorRT proper compiles for the GPU that is present, and knows GPUs that TensorRT-RTX does not (SM 90, 100, 103). The
graphs are the same; where its fused mixture of experts exists, ``LowerExpertsFused`` takes the place of the other
lowerings of experts. Its plans have another format, which ``plan.py`` does not read: nothing is proved of them here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ....errors import HerdError
from ....runtimes.executors.tensorrt.cuda import Cuda
from .builder import Build, Profile, appearing
from .fp8_products import refuse_wrong_patterns

FUSED_EXPERTS = range(100, 120)
"""Compute capabilities with TensorRT's fused mixture of experts."""


def load_tensorrt() -> Any:
    """The ``tensorrt`` module with its libraries.

    Raises:
        HerdError: it is not installed, or only its metapackage is.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise HerdError("tensorrt is not installed: pip install 'herdgraph[tensorrt]' on the machine with the GPU"
                        ) from error
    return tensorrt


def has_fused_experts() -> bool:
    """Whether TensorRT has a fused mixture of experts (``TRT_MoE``) for the GPU of this machine."""
    try:
        found = Cuda().compute_capability
    except HerdError:  # no GPU or no CUDA: the build will say so
        return False
    return int(found) in FUSED_EXPERTS


def build_plan_here(onnx_path: Path, output: Path, *, profiles: Sequence[Profile]) -> Path:
    """Build a plan for the GPU of this machine. Arguments as of ``build_plan``.

    Raises:
        HerdError: no ``tensorrt``, no GPU, or what TensorRT objects to.
    """
    model = ir.load(onnx_path)
    refuse_wrong_patterns(model)
    trt = load_tensorrt()
    try:
        build = Build(trt)
    except Exception as error:  # pybind raises TypeError when the factory returns nothing
        raise HerdError(f"tensorrt {trt.__version__} finds no GPU on this machine: build with --target tensorrt-rtx, "
                        "which needs none") from error
    data = build.run(onnx_path, model, (), profiles)
    with appearing(output) as temporary:
        temporary.write_bytes(memoryview(data))
    return output
