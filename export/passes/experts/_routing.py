"""What every lowering of ``RoutedExperts`` shares: the node taken apart, scores, and the order by expert.

Shapes: T tokens, D width, E experts, F expert width, k choices, A = T · k assignments of a token to an expert.

A rank of several may hold a range of the experts (attribute ``first_expert``). The logits are of all of them; E counts
the range, and what is assigned to other ranks' experts adds zero.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ....model.llama4.operators import DOMAIN
from ...graph.builder import Builder
from ..report import report


class ExpertsLowering:
    """The rewrite of one ``RoutedExperts``; subclasses say how the chosen experts are computed."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        self.top_k = node.attributes["top_k"].as_int()
        self.is_range = "first_expert" in node.attributes
        self.first = node.attributes["first_expert"].as_int() if self.is_range else 0
        self.x_TD, self.logits_TE, *self.weights = (value for value in node.inputs if value is not None)
        gate_up, down = (value.const_value for value in self.weights)
        assert gate_up is not None and down is not None, f"{node.name} has unbound weights: bind before lowering"  # noqa: PT018
        self.gate_up, self.down = gate_up, down
        self.experts, self.width = gate_up.shape.numpy()[:2]

    def replace(self) -> None:
        """Put the lowered nodes in the place of the operator, and drop weights that nothing reads any more."""
        graph = self.node.graph
        assert isinstance(graph, ir.Graph)
        build = Builder(str(self.node.name))
        y_TD = self.build(build)
        for weight in build.weights:
            graph.register_initializer(weight)
        ir.convenience.replace_nodes_and_values(graph, self.node, [self.node], build.nodes, self.node.outputs, [y_TD])
        for weight in self.weights:
            if not weight.uses():
                del graph.initializers[str(weight.name)]

    def build(self, build: Builder) -> ir.Value:
        """Record the nodes; returns y_TD."""
        raise NotImplementedError

    def choose(self, build: Builder) -> tuple[ir.Value, ir.Value]:
        """Logits and ids of every token's experts, best first: [T, k] each."""
        logits_Tk, experts_Tk = build("TopK", self.logits_TE, build.constant([self.top_k]), outputs=2, axis=-1)
        return logits_Tk, experts_Tk

    def choose_own(self, build: Builder) -> tuple[ir.Value, ir.Value]:
        """Scores of every token's experts and which of the weights they use: [T, k] each; other ranks' score 0."""
        logits_Tk, experts_Tk = self.choose(build)
        score_Tk = build("Sigmoid", logits_Tk)
        if not self.is_range:
            return score_Tk, experts_Tk
        own_Tk = build("Sub", experts_Tk, build.constant(self.first))
        is_own_Tk = self.is_within(build, own_Tk, build.constant(self.experts))
        zero = build("Constant", value=ir.Tensor(np.float32(0)))
        return build("Where", is_own_Tk, score_Tk, zero), build("Where", is_own_Tk, own_Tk, build.constant(0))

    @staticmethod
    def is_within(build: Builder, index: ir.Value, count: ir.Value) -> ir.Value:
        """Whether an index is not below 0 and below ``count``."""
        within: ir.Value = build("And", build("GreaterOrEqual", index, build.constant(0)), build("Less", index, count))
        return within

    def scaled(self, build: Builder, score_Tk: ir.Value) -> ir.Value:
        """Every assignment's input, scaled by its score: [A, D]."""
        if self.top_k == 1:
            return build("Mul", self.x_TD, score_Tk)
        scaled_TkD = build("Mul", build("Unsqueeze", self.x_TD, build.constant([1])),
                           build("Unsqueeze", score_Tk, build.constant([2])))
        return build("Reshape", scaled_TkD, build.constant([-1, self.width]))

    @staticmethod
    def order(build: Builder, key_A: ir.Value) -> ir.Value:
        """Indices that sort the keys, smallest first; of an order, they are its inverse permutation."""
        return build("TopK", key_A, build("Shape", key_A), outputs=2, largest=0, sorted=1, axis=0)[1]

    def row_bounds(self, build: Builder, expert_A: ir.Value) -> ir.Value:
        """E + 1 bounds: expert e has the sorted rows from bound e up to bound e + 1."""
        ids_X1 = build.constant([[self.first + expert] for expert in range(self.experts + 1)])
        before_XA = build("Cast", build("Less", expert_A, ids_X1), to=ir.DataType.INT64)
        return build("ReduceSum", before_XA, build.constant([1]), keepdims=0)

    def summed(self, build: Builder, y_AD: ir.Value) -> ir.Value:
        """Outputs of a token's choices added up: [T, D]."""
        if self.top_k == 1:
            return y_AD
        y_TkD = build("Reshape", y_AD, build.constant([-1, self.top_k, self.width]))
        return build("ReduceSum", y_TkD, build.constant([1]), keepdims=0)


def feed_forward(build: Builder, x: ir.Value, gate_up: ir.Value, down: ir.Value) -> ir.Value:
    """down(silu(gate) * up), gate columns first; batched when the weights are."""
    gate, up = build("Split", build("MatMul", x, gate_up), outputs=2, axis=-1, num_outputs=2)
    silu = build("Mul", gate, build("Sigmoid", gate))
    return build("MatMul", build("Mul", silu, up), down)


class ExpertsPass(InPlacePass):
    """Replaces every ``RoutedExperts`` of the main graph by what ``lowering`` builds."""

    lowering: ClassVar[type[ExpertsLowering]]

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        targets = [node for node in model.graph if node.domain == DOMAIN and node.op_type == "RoutedExperts"]
        for node in targets:
            self.lowered(node).replace()
        return report(self, model, targets)

    def lowered(self, node: ir.Node) -> ExpertsLowering:
        """The rewrite of one node."""
        return self.lowering(node)
