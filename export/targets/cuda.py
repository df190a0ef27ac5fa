"""Target ``cuda``: graphs for ONNX Runtime's CUDA provider, in bfloat16, with the operators that it brings along.

Everything up to ``Tidy`` is exact: that graph is in float32, made of operators that a CPU has too (our own
``PagedAttention`` among them), and gives the canonical graph's logits there. It is the twin, and what every test of
numbers runs. What follows changes the interface to that of the CUDA operator, and types. Writing graphs takes neither a
GPU nor ``onnxruntime-gpu``.

Kernels are those of onnxruntime-gpu 1.31 for compute capabilities 8.0 to 9.0 and 12.0. The router's product is in
float32, which the provider rounds to TF32 unless it is loaded with ``use_tf32=0`` (docs/cuda.md has all options).
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass

from ...model.quantization.calibration_file import CalibrationFile
from ...model.quantization.recipes import Recipe
from ..passes import (
    AddBestToken,
    ComputeIn,
    FoldWeightTransposes,
    JoinMatMuls,
    JoinResidualNorms,
    LowerExpertsContrib,
    LowerPagedAttention,
    LowerPagedContrib,
    PackTokens,
    QuantizeMatMuls,
    ReshapeRows,
    ScaleByExcess,
    Tidy,
)
from .options import PlanOptions
from .target import Target

_NATIVE = ("RMSNormalization", "LayerNormalization", "RotaryEmbedding")
"""Operators whose CUDA kernels read and write bfloat16 and compute in float32."""


class CudaTarget(Target):
    """Tokens of several sequences in one list, caches in blocks, fused experts; weights in 16, 8 or 4 bits."""

    @property
    def float_bytes(self) -> int:
        """See ``Target``."""
        return 2

    def stored(self, recipe: Recipe) -> Recipe:
        """See ``Target``."""
        return super().stored(recipe).centered()

    def pipeline(
        self, recipe: Recipe, options: PlanOptions, calibration: CalibrationFile | None = None
    ) -> list[InPlacePass]:
        """See ``Target``."""
        del options
        return [
            *self.twin(recipe, calibration),
            LowerPagedContrib(recipe.caches, calibration),
            ComputeIn(ir.DataType.BFLOAT16, _NATIVE),
            ScaleByExcess(),
        ]

    def twin(self, recipe: Recipe, calibration: CalibrationFile | None = None) -> list[InPlacePass]:
        """The passes up to the float32 graph that runs on a CPU as well. Arguments as in ``pipeline``."""
        return [
            PackTokens(),
            ReshapeRows(),
            FoldWeightTransposes(),
            LowerExpertsContrib(recipe, calibration),
            JoinMatMuls(),
            LowerPagedAttention("float"),
            JoinResidualNorms(),
            *([QuantizeMatMuls(recipe, calibration)] if recipe.rules else []),
            AddBestToken(),
            Tidy(),
        ]


CUDA = CudaTarget("cuda", "ONNX Runtime on an NVIDIA GPU, in bfloat16; not run on hardware", "onnxruntime-cuda",
                  "CUDAExecutionProvider")
