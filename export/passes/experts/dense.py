"""``RoutedExperts`` as two batched products over all experts, for TensorRT at small and middling numbers of tokens.

    x [1, T, D] · score [E, T, 1]  ->  gate_up [E, D, 2F]  ->  silu(gate) · up  ->  down [E, F, D]  ->  sum over E

A token's input of an expert that it did not choose is zero, and so is the expert's output: E / k times the
arithmetic of the chosen experts, but every weight is read once, and the shapes do not depend on the data.
"""

from __future__ import annotations

import onnx_ir as ir

from ...graph.builder import Builder
from ._routing import ExpertsLowering, ExpertsPass, feed_forward


class _Dense(ExpertsLowering):
    def build(self, build: Builder) -> ir.Value:
        scores_ET1 = self._scores(build, *self.choose(build))
        x_1TD = build("Unsqueeze", self.x_TD, build.constant([0]))
        y_ETD = feed_forward(build, build("Mul", x_1TD, scores_ET1), *self.weights)
        return build("ReduceSum", y_ETD, build.constant([0]), keepdims=0)

    def _scores(self, build: Builder, logits_Tk: ir.Value, experts_Tk: ir.Value) -> ir.Value:
        """The sigmoid of a chosen expert's logit, 0 for the others: [E, T, 1]."""
        ids_E11 = build.constant([[[self.first + expert]] for expert in range(self.experts)])
        chosen_ETk = build("Cast", build("Equal", ids_E11, experts_Tk), to=ir.DataType.FLOAT)
        scores_ETk = build("Mul", chosen_ETk, build("Sigmoid", logits_Tk))
        return scores_ETk if self.top_k == 1 else build("ReduceSum", scores_ETk, build.constant([-1]), keepdims=1)


class LowerExpertsDense(ExpertsPass):
    """Replace every ``RoutedExperts`` by masked, batched products; the weights stay as they are."""

    lowering = _Dense
