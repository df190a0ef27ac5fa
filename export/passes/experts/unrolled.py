"""``RoutedExperts`` as one pair of products per expert on its own rows, for TensorRT prompts.

    tokens sorted by expert (x scaled by its score)  ->  for each expert: Slice, gate_up, silu · up, down
    ->  concatenated, put back in order, summed over a token's choices

Only the chosen experts' arithmetic, at the cost of E small graphs. TensorRT has no ``NonZero`` and no ``If`` that
would pay here, and a product without rows was never seen to run on hardware: an expert without tokens computes the
row at its place in the order, whose result nobody reads. So every product has at least one row:

    begin_e = min(bound_e, A - 1)     end_e = max(bound_{e+1}, begin_e + 1)     1 <= end_e - begin_e
    row of an assignment in the concatenation = its place in the order - bound_e + rows of the experts before e

What is assigned to other ranks' experts reads a row of zeros behind the last.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...graph.builder import Builder
from ...weights.stream import expert_of
from ._routing import ExpertsLowering, ExpertsPass, feed_forward


class _Unrolled(ExpertsLowering):
    def build(self, build: Builder) -> ir.Value:
        logits_Tk, experts_Tk = self.choose(build)
        expert_A = build("Reshape", experts_Tk, build.constant([-1]))
        order_A = self.order(build, expert_A)
        sorted_AD = build("Gather", self.scaled(build, build("Sigmoid", logits_Tk)), order_A, axis=0)
        first_E, begin_E, end_E = self._ranges(build, expert_A)
        parts = [self._expert(build, expert, sorted_AD, begin_E, end_E) for expert in range(self.experts)]
        before_E = build("CumSum", build("Sub", end_E, begin_E), build.constant(0), exclusive=1)
        moved_E, place_A = build("Sub", before_E, first_E), self.order(build, order_A)
        if self.is_range:
            parts.append(build("Constant", value=ir.Tensor(np.zeros((1, self.width), np.float32))))
        y_RD = build("Concat", *parts, axis=0)
        row_A = self._own_or_zeros(build, expert_A, moved_E, place_A, y_RD) if self.is_range else build(
            "Add", place_A, build("Gather", moved_E, expert_A, axis=0))
        return self.summed(build, build("Gather", y_RD, row_A, axis=0))

    def _own_or_zeros(
        self, build: Builder, expert_A: ir.Value, moved_E: ir.Value, place_A: ir.Value, y_RD: ir.Value
    ) -> ir.Value:
        """Rows of assignments among all outputs, the last row for what is other ranks'."""
        own_A = build("Sub", expert_A, build.constant(self.first))
        is_own_A = self.is_within(build, own_A, build.constant(self.experts))
        moved_A = build("Gather", moved_E, build("Where", is_own_A, own_A, build.constant(0)), axis=0)
        zeros_1 = build("Sub", build("Shape", y_RD, start=0, end=1), build.constant([1]))
        row_A: ir.Value = build("Where", is_own_A, build("Add", place_A, moved_A), zeros_1)
        return row_A

    def _ranges(self, build: Builder, expert_A: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Per expert: its first sorted row, and the rows that it computes, from begin up to end."""
        bounds_X = self.row_bounds(build, expert_A)
        first_E = build("Slice", bounds_X, build.constant([0]), build.constant([self.experts]))
        next_E = build("Slice", bounds_X, build.constant([1]), build.constant([self.experts + 1]))
        last_1 = build("Sub", build("Shape", expert_A), build.constant([1]))
        begin_E = build("Min", first_E, last_1)
        return first_E, begin_E, build("Max", next_E, build("Add", begin_E, build.constant([1])))

    def _expert(self, build: Builder, expert: int, x_AD: ir.Value, begin_E: ir.Value, end_E: ir.Value) -> ir.Value:
        bounds = (build("Gather", bound_E, build.constant([expert])) for bound_E in (begin_E, end_E))
        x_RD = build("Slice", x_AD, *bounds, build.constant([0]))
        gate_up_D2F = build.weight(f"expert_{expert}.gate_up_proj", expert_of(self.gate_up, expert))
        down_FD = build.weight(f"expert_{expert}.down_proj", expert_of(self.down, expert))
        return feed_forward(build, x_RD, gate_up_D2F, down_FD)


class LowerExpertsUnrolled(ExpertsPass):
    """Replace every ``RoutedExperts`` by a pair of products per expert, with weights of their own."""

    lowering = _Unrolled
