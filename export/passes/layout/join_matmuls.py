"""One matrix product for all weights that read the same input: q, k and v; gate and up."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ...graph.builder import Builder
from ...weights.origin import origin_of
from ...weights.stream import Joined
from ..report import report

_KEPT = ("router",)
"""Roles that stay apart: a router is never quantised, and its product is small."""


class JoinMatMuls(InPlacePass):
    """Replace products ``x W1``, ``x W2``, ... by ``Split(x [W1 W2 ...])``.

    A token then pays for one product instead of three: one dispatch to the threads and, with quantised weights, one
    quantisation of x. The joined weight is still read part by part while it is written.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        groups: dict[int, list[ir.Node]] = {}
        for node in model.graph:
            if self._applies(node):
                groups.setdefault(id(node.inputs[0]), []).append(node)
        joined = [nodes for nodes in groups.values() if len(nodes) > 1]
        for nodes in joined:
            self._join(model.graph, nodes)
        alone = [(nodes[0], "no other product reads its input") for nodes in groups.values() if len(nodes) == 1]
        return report(self, model, [node for nodes in joined for node in nodes], alone)

    @staticmethod
    def _applies(node: ir.Node) -> bool:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        return (
            weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 2
            and len(weight.uses()) == 1
            and not any(role in origin_of(weight.const_value).name.split(".") for role in _KEPT)
        )

    @staticmethod
    def _join(graph: ir.Graph, nodes: list[ir.Node]) -> None:
        weights = [weight for node in nodes if (weight := node.inputs[1]) is not None]
        tensor = Joined([weight.const_value for weight in weights if weight.const_value is not None])
        joined = ir.Value(
            name="+".join(str(weight.name) for weight in weights), shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype), const_value=tensor,
        )
        graph.register_initializer(joined)
        build = Builder(f"{nodes[0].name}/joined")
        sizes = build("Constant", value=ir.Tensor(np.asarray(tensor.widths, np.int64)))
        parts = build("Split", build("MatMul", nodes[0].inputs[0], joined), sizes, outputs=len(nodes), axis=-1)
        outputs = [node.outputs[0] for node in nodes]
        ir.convenience.replace_nodes_and_values(graph, nodes[0], nodes, build.nodes, outputs, parts)
        for weight in weights:
            del graph.initializers[str(weight.name)]
