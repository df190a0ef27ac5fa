"""``RoutedExperts`` for a CPU: sort tokens by expert, run only the experts that got some.

    chosen, score  ->  tokens sorted by expert (x scaled by its score)
    for each group of ~sqrt(E) experts with any token:
        for each expert with any token:   down(silu(gate) * up) on its contiguous rows
    ->  concatenated, put back in order, summed over a token's choices

Two levels of ``If`` keep the cost of the experts that are *not* used at about two comparisons per group: with 128
experts a token touches 11 groups and 12 experts of one group. Each expert's weights are initializers of its own
branch: ONNX Runtime packs a weight once only when it lives in the subgraph that uses it, and a runtime that maps
weights reads a branch's pages only when the branch runs.

Of a range of experts only its own rows are gathered; what is assigned to others reads a row of zeros behind the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from ...graph.builder import Builder
from ...weights.stream import expert_of
from ._routing import ExpertsLowering, ExpertsPass, feed_forward

ExpertRange = tuple[int, int, Callable[..., ir.Value]]
"""First expert, end, and what builds their rows inside a branch."""


class _Grouped(ExpertsLowering):
    def build(self, build: Builder) -> ir.Value:
        logits_Tk, experts_Tk = self.choose(build)
        expert_A = build("Reshape", experts_Tk, build.constant([-1]))
        order_A = self.order(build, expert_A)
        self.bounds_X = self.row_bounds(build, expert_A)
        x_AD = self.scaled(build, build("Sigmoid", logits_Tk))
        if self.is_range:
            return self.summed(build, self._own_rows(build, x_AD, order_A))
        y_sorted_AD = self._all_groups(build, build("Gather", x_AD, order_A, axis=0))
        # Sorting the order itself gives where every assignment went: the inverse permutation.
        return self.summed(build, build("Gather", y_sorted_AD, self.order(build, order_A), axis=0))

    def _own_rows(self, build: Builder, x_AD: ir.Value, order_A: ir.Value) -> ir.Value:
        """Outputs of all assignments, those of other ranks' experts zero; R own rows."""
        first, last = (build("Gather", self.bounds_X, build.constant([bound])) for bound in (0, self.experts))
        own_R = build("Slice", order_A, first, last)
        self.bounds_X = build("Sub", self.bounds_X, first)
        y_RD = self._all_groups(build, build("Gather", x_AD, own_R, axis=0))
        zeros_1D = build("Constant", value=ir.Tensor(np.zeros((1, self.width), np.float32)))
        place_A, count = build("Sub", self.order(build, order_A), first), build("Sub", last, first)
        row_A = build("Where", self.is_within(build, place_A, count), place_A, count)
        y_AD: ir.Value = build("Gather", build("Concat", y_RD, zeros_1D, axis=0), row_A, axis=0)
        return y_AD

    def _all_groups(self, build: Builder, x_AD: ir.Value) -> ir.Value:
        size = math.ceil(math.sqrt(self.experts))
        return self._ranges(build, [
            (first, min(first + size, self.experts), partial(self._group, x_AD=x_AD))
            for first in range(0, self.experts, size)
        ])

    def _group(self, build: Builder, first: int, last: int, x_AD: ir.Value) -> ir.Value:
        return self._ranges(build, [
            (expert, expert + 1, partial(self._expert, x_AD=x_AD)) for expert in range(first, last)
        ])

    def _ranges(self, build: Builder, ranges: list[ExpertRange]) -> ir.Value:
        """Rows of consecutive ranges of experts; a range without rows costs a branch not taken."""
        begins, ends = [first for first, _, _ in ranges], [last for _, last, _ in ranges]
        bounds = [build("Gather", self.bounds_X, build.constant(ids)) for ids in (begins, ends)]
        conditions = build("Less", *bounds)
        if len(ranges) > 1:
            conditions = build("Split", conditions, outputs=len(ranges), axis=0, num_outputs=len(ranges))
        else:
            conditions = [conditions]
        parts = [
            build.branch(condition, partial(run, first=first, last=last), self._no_rows)
            for condition, (first, last, run) in zip(conditions, ranges, strict=True)
        ]
        return build("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]

    def _expert(self, build: Builder, first: int, last: int, x_AD: ir.Value) -> ir.Value:
        begin, end = (build("Gather", self.bounds_X, build.constant([bound])) for bound in (first, last))
        x_RD = build("Slice", x_AD, begin, end, build.constant([0]))
        gate_up_D2F = build.weight(f"expert_{first}.gate_up_proj", expert_of(self.gate_up, first))
        down_FD = build.weight(f"expert_{first}.down_proj", expert_of(self.down, first))
        return feed_forward(build, x_RD, gate_up_D2F, down_FD)

    def _no_rows(self, build: Builder) -> ir.Value:
        return build("Constant", value=ir.Tensor(np.zeros((0, self.width), np.float32)))


class LowerRoutedExperts(ExpertsPass):
    """Replace every ``RoutedExperts`` by grouped, conditional matrix products."""

    lowering = _Grouped
