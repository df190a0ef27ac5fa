"""``RoutedExperts`` as batched products with gathered weights, for TensorRT when a call holds few tokens.

    weights of the chosen experts [A, D, 2F]  ->  x [A, 1, D] · them  ->  silu(gate) · up  ->  down [A, F, D]

A decoded token reads the weights of its own experts and no others. They are copied, once per assignment: with many
tokens the copies cost more than computing every expert (``dense.py``).
"""

from __future__ import annotations

import onnx_ir as ir

from ...graph.builder import Builder
from ._routing import ExpertsLowering, ExpertsPass, feed_forward


class _Gathered(ExpertsLowering):
    def build(self, build: Builder) -> ir.Value:
        score_Tk, experts_Tk = self.choose_own(build)
        expert_A = build("Reshape", experts_Tk, build.constant([-1]))
        x_A1D = build("Unsqueeze", self.scaled(build, score_Tk), build.constant([1]))
        gate_up_AD2F, down_AFD = (build("Gather", weight, expert_A, axis=0) for weight in self.weights)
        y_A1D = feed_forward(build, x_A1D, gate_up_AD2F, down_AFD)
        return self.summed(build, build("Squeeze", y_A1D, build.constant([1])))


class LowerExpertsGathered(ExpertsPass):
    """Replace every ``RoutedExperts`` by products with the chosen experts' weights; the weights stay as they are."""

    lowering = _Gathered
