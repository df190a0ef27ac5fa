"""The target ``cuda`` as a CPU can run it: its graph in float32, with attention of standard operators."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from herdgraph.export.passes import LowerPagedContrib
from herdgraph.export.targets.cuda import CUDA, CudaTarget
from herdgraph.export.targets.options import PlanOptions
from herdgraph.model.quantization.recipes import Recipe
from support import contrib_attention


class ExpandAttention(InPlacePass):
    """See ``contrib_attention.py``."""

    def call(self, model: ir.Model) -> PassResult:
        contrib_attention.expand(model)
        return PassResult(model, modified=True)


class CudaTwin(CudaTarget):
    """Lowers as the target ``cuda``, but for what only its kernels understand."""

    def pipeline(self, recipe: Recipe, options: PlanOptions, calibration: Any = None) -> list[InPlacePass]:
        del options
        return [*self.twin(recipe, calibration), LowerPagedContrib(recipe.caches, calibration), ExpandAttention()]


CUDA_TWIN = CudaTwin(CUDA.name, CUDA.purpose, CUDA.executor, "CPUExecutionProvider")
