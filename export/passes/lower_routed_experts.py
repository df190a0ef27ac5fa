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
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ...model.operators import DOMAIN
from ..builder import Builder
from ..weights import expert_of


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
        logits_Tk, experts_Tk = build("TopK", logits_TE, build.constant([self.top_k]), outputs=2, axis=-1)
        scaled_TkD = build("Mul", build("Unsqueeze", x_TD, build.constant([1])),
                           build("Unsqueeze", build("Sigmoid", logits_Tk), build.constant([2])))
        scaled_AD = build("Reshape", scaled_TkD, build.constant([-1, self.width]))
        expert_A = build("Reshape", experts_Tk, build.constant([-1]))
        _, order_A = build("TopK", expert_A, build("Shape", expert_A), outputs=2, largest=0, sorted=1, axis=0)
        sorted_AD = build("Gather", scaled_AD, order_A, axis=0)
        y_sorted_AD = self._all_groups(build, sorted_AD, *self._row_ranges(build, expert_A))
        zeros_AD = build("ConstantOfShape", build("Shape", y_sorted_AD), value=ir.Tensor(np.zeros(1, np.float32)))
        y_AD = build("ScatterND", zeros_AD, build("Unsqueeze", order_A, build.constant([1])), y_sorted_AD)
        if self.top_k == 1:
            return y_AD
        y_TkD = build("Reshape", y_AD, build.constant([-1, self.top_k, self.width]))
        return build("ReduceSum", y_TkD, build.constant([1]), keepdims=0)

    def _row_ranges(self, build: Builder, expert_A: ir.Value) -> tuple[ir.Value, ir.Value]:
        """First row and end of every expert among the sorted tokens, int64 [E] each."""
        ids_E1 = build.constant([[expert] for expert in range(self.experts)])
        hits_EA = build("Cast", build("Equal", ids_E1, expert_A), to=ir.DataType.INT64)
        counts_E = build("ReduceSum", hits_EA, build.constant([1]), keepdims=0)
        ends_E = build("CumSum", counts_E, build.constant(0))
        return build("Sub", ends_E, counts_E), ends_E

    def _all_groups(self, build: Builder, x_AD: ir.Value, begins_E: ir.Value, ends_E: ir.Value) -> ir.Value:
        size = math.ceil(math.sqrt(self.experts))
        parts = []
        for first in range(0, self.experts, size):
            last = min(first + size, self.experts)
            begin = self._entry(build, begins_E, first)
            end = self._entry(build, ends_E, last - 1)
            run = partial(self._group, x_AD=x_AD, begins_E=begins_E, ends_E=ends_E, first=first, last=last)
            parts.append(build.branch(build("Less", begin, end), run, partial(self._no_rows, x_AD=x_AD)))
        return build("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]

    def _group(
        self, build: Builder, x_AD: ir.Value, begins_E: ir.Value, ends_E: ir.Value, first: int, last: int
    ) -> ir.Value:
        parts = []
        for expert in range(first, last):
            begin, end = (self._entry(build, rows_E, expert) for rows_E in (begins_E, ends_E))
            run = partial(self._expert, x_AD=x_AD, begin=begin, end=end, expert=expert)
            parts.append(build.branch(build("Less", begin, end), run, partial(self._no_rows, x_AD=x_AD)))
        return build("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]

    def _expert(self, build: Builder, x_AD: ir.Value, begin: ir.Value, end: ir.Value, expert: int) -> ir.Value:
        x_RD = build("Slice", x_AD, begin, end, build.constant([0]))
        gate_up_D2F = build.weight(f"expert_{expert}.gate_up_proj", expert_of(self.gate_up, expert))
        down_FD = build.weight(f"expert_{expert}.down_proj", expert_of(self.down, expert))
        gate_RF, up_RF = build("Split", build("MatMul", x_RD, gate_up_D2F), outputs=2, axis=-1, num_outputs=2)
        silu_RF = build("Mul", gate_RF, build("Sigmoid", gate_RF))
        return build("MatMul", build("Mul", silu_RF, up_RF), down_FD)

    @staticmethod
    def _entry(build: Builder, rows_E: ir.Value, expert: int) -> ir.Value:
        """One expert's entry, shape [1], as ``Slice`` and ``If`` accept it."""
        return build("Gather", rows_E, build.constant([expert]), axis=0)

    @staticmethod
    def _no_rows(build: Builder, x_AD: ir.Value) -> ir.Value:
        zero = build.constant([0])
        return build("Slice", x_AD, zero, zero, zero)
