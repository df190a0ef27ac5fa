"""``RoutedExperts`` as TensorRT's fused mixture of experts (``TRT_MoE``), for SM 100 and newer of that line.

The fused layer multiplies an expert's *output* by its score; Llama 4 multiplies the input, which is another function.
So every assignment of a token to an expert becomes a token of its own, scaled beforehand, with one expert and a score
of 1:

    x [A, 1, D] · score    expert [A, 1, 1]    1 [A, 1, 1]    gate, up [E, D, F]    down [E, F, D]   ->   y [A, 1, D]

Not run on hardware; TensorRT-RTX reads it but does not build it for the GPUs that it knows.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from ...graph.builder import Builder
from ._routing import ExpertsLowering, ExpertsPass

TENSORRT = "trt"
"""ONNX domain of TensorRT's own operators."""
_SILU = 1
"""``MoEActType.SILU``."""
_NOT_QUANTIZED = 0
"""The parser wants a type for quantised weights; it takes any number when there are no scales."""


class _Fused(ExpertsLowering):
    def build(self, build: Builder) -> ir.Value:
        score_Tk, experts_Tk = self.choose_own(build)
        x_A1D = build("Unsqueeze", self.scaled(build, score_Tk), build.constant([1]))
        expert_A11 = build("Cast", build("Reshape", experts_Tk, build.constant([-1, 1, 1])), to=ir.DataType.INT32)
        one = ir.Tensor(np.ones(1, np.float32))
        one_A11 = build("ConstantOfShape", build("Shape", expert_A11), value=one)
        gate_EDF, up_EDF = build("Split", self.weights[0], outputs=2, axis=2, num_outputs=2)
        y_A1D = build(
            "TRT_MoE", x_A1D, expert_A11, one_A11, gate_EDF, up_EDF, self.weights[1], domain=TENSORRT,
            activation_type=_SILU, quantization_dtype=_NOT_QUANTIZED,
        )
        return self.summed(build, build("Squeeze", y_A1D, build.constant([1])))


class LowerExpertsFused(ExpertsPass):
    """Replace every ``RoutedExperts`` by ``TRT_MoE``; the weights stay as they are."""

    lowering = _Fused

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        result = super().call(model)
        if result.modified:
            model.opset_imports[TENSORRT] = 1
        return result
