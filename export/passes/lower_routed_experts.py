"""``RoutedExperts`` for a CPU: sort tokens by expert, run only the experts that got some.

    chosen, score  ->  tokens sorted by expert (x scaled by its score)
    for each group of ~sqrt(E) experts with any token:
        for each expert with any token:   down(silu(gate) * up) on its contiguous rows
    ->  concatenated, put back in order, summed over a token's choices

Two levels of ``If`` keep the cost of the experts that are *not* used at about two comparisons per group: with 128
experts a token touches 11 groups and 12 experts of one group. Each expert's weights are initializers of its own
branch: ONNX Runtime packs a weight once only when it lives in the subgraph that uses it, and a runtime that maps
weights reads a branch's pages only when the branch runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ...model.operators import DOMAIN
from ..builder import Builder
from ..weights import expert_of

Piece = tuple[int, int, Callable[..., ir.Value]]
"""First expert, end, and what builds their rows inside a branch."""


class LowerRoutedExperts(InPlacePass):
    """Replace every ``RoutedExperts`` by grouped, conditional matrix products."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        targets = [node for node in model.graph if node.domain == DOMAIN and node.op_type == "RoutedExperts"]
        for node in targets:
            _ExpertsLowering(node).replace()
        return PassResult(model, modified=bool(targets))


class _ExpertsLowering:
    """One node's rewrite. A: assignments, tokens times choices; they are sorted by expert."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        self.top_k = node.attributes["top_k"].as_int()
        self.weights = [value for value in node.inputs[2:] if value is not None]
        gate_up, down = (value.const_value for value in self.weights)
        assert gate_up is not None and down is not None, f"{node.name} has unbound weights: bind before lowering"  # noqa: PT018
        self.gate_up, self.down = gate_up, down
        self.experts, self.width = gate_up.shape.numpy()[:2]

    def replace(self) -> None:
        graph = self.node.graph
        assert isinstance(graph, ir.Graph)
        build = Builder(str(self.node.name))
        y_TD = self._build(build)
        ir.convenience.replace_nodes_and_values(graph, self.node, [self.node], build.nodes, self.node.outputs, [y_TD])
        for weight in self.weights:
            del graph.initializers[str(weight.name)]

    def _build(self, build: Builder) -> ir.Value:
        x_TD, logits_TE = self.node.inputs[:2]
        assert x_TD is not None
        logits_Tk, experts_Tk = build("TopK", logits_TE, build.constant([self.top_k]), outputs=2, axis=-1)
        expert_A = build("Reshape", experts_Tk, build.constant([-1]))
        order_A = self._order(build, expert_A)
        sorted_AD = build("Gather", self._scaled(build, x_TD, build("Sigmoid", logits_Tk)), order_A, axis=0)
        self.bounds_X = self._row_bounds(build, expert_A)
        y_sorted_AD = self._all_groups(build, sorted_AD)
        # Sorting the order itself gives where every assignment went: the inverse permutation.
        y_AD = build("Gather", y_sorted_AD, self._order(build, order_A), axis=0)
        if self.top_k == 1:
            return y_AD
        y_TkD = build("Reshape", y_AD, build.constant([-1, self.top_k, self.width]))
        return build("ReduceSum", y_TkD, build.constant([1]), keepdims=0)

    def _scaled(self, build: Builder, x_TD: ir.Value, score_Tk: ir.Value) -> ir.Value:
        """Every assignment's input, scaled by its score: [A, D]."""
        if self.top_k == 1:
            return build("Mul", x_TD, score_Tk)
        scaled_TkD = build("Mul", build("Unsqueeze", x_TD, build.constant([1])),
                           build("Unsqueeze", score_Tk, build.constant([2])))
        return build("Reshape", scaled_TkD, build.constant([-1, self.width]))

    @staticmethod
    def _order(build: Builder, key_A: ir.Value) -> ir.Value:
        """Indices that sort the keys, smallest first."""
        return build("TopK", key_A, build("Shape", key_A), outputs=2, largest=0, sorted=1, axis=0)[1]

    def _row_bounds(self, build: Builder, expert_A: ir.Value) -> ir.Value:
        """E + 1 bounds: expert e has the sorted rows from bound e up to bound e + 1."""
        ids_X1 = build.constant([[expert] for expert in range(self.experts + 1)])
        before_XA = build("Cast", build("Less", expert_A, ids_X1), to=ir.DataType.INT64)
        return build("ReduceSum", before_XA, build.constant([1]), keepdims=0)

    def _all_groups(self, build: Builder, x_AD: ir.Value) -> ir.Value:
        size = math.ceil(math.sqrt(self.experts))
        return self._pieces(build, [
            (first, min(first + size, self.experts), partial(self._group, x_AD=x_AD))
            for first in range(0, self.experts, size)
        ])

    def _group(self, build: Builder, first: int, last: int, x_AD: ir.Value) -> ir.Value:
        return self._pieces(build, [
            (expert, expert + 1, partial(self._expert, x_AD=x_AD)) for expert in range(first, last)
        ])

    def _pieces(self, build: Builder, pieces: list[Piece]) -> ir.Value:
        """Rows of consecutive ranges of experts; a range without rows costs a branch not taken."""
        begins, ends = [first for first, _, _ in pieces], [last for _, last, _ in pieces]
        bounds = [build("Gather", self.bounds_X, build.constant(ids)) for ids in (begins, ends)]
        conditions = build("Less", *bounds)
        if len(pieces) > 1:
            conditions = build("Split", conditions, outputs=len(pieces), axis=0, num_outputs=len(pieces))
        else:
            conditions = [conditions]
        parts = [
            build.branch(condition, partial(run, first=first, last=last), self._no_rows)
            for condition, (first, last, run) in zip(conditions, pieces, strict=True)
        ]
        return build("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]

    def _expert(self, build: Builder, first: int, last: int, x_AD: ir.Value) -> ir.Value:
        begin, end = (build("Gather", self.bounds_X, build.constant([bound])) for bound in (first, last))
        x_RD = build("Slice", x_AD, begin, end, build.constant([0]))
        gate_up_D2F = build.weight(f"expert_{first}.gate_up_proj", expert_of(self.gate_up, first))
        down_FD = build.weight(f"expert_{first}.down_proj", expert_of(self.down, first))
        gate_RF, up_RF = build("Split", build("MatMul", x_RD, gate_up_D2F), outputs=2, axis=-1, num_outputs=2)
        silu_RF = build("Mul", gate_RF, build("Sigmoid", gate_RF))
        return build("MatMul", build("Mul", silu_RF, up_RF), down_FD)

    def _no_rows(self, build: Builder) -> ir.Value:
        return build("Constant", value=ir.Tensor(np.zeros((0, self.width), np.float32)))
