"""Store linear weights as the matrix product reads them."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ...graph.builder import Builder
from ...weights.stream import transposed
from ..report import report


class FoldWeightTransposes(InPlacePass):
    """Replace ``Transpose(weight)`` by a weight that is written transposed, and ``Gemm`` of one by ``MatMul``.

    Checkpoints hold [out, in], ``MatMul`` wants [in, out]. Left in the graph, a runtime folds the transposition at
    every load, in memory. A weight that is also used as it stands (a tied embedding) is stored in both orders.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        graph = model.graph
        for node in [node for node in graph if self._is_plain_gemm(node)]:
            self._unfold_gemm(graph, node)
        folded, declined = [], []
        for node in [node for node in graph if node.op_type == "Transpose"]:
            weight = node.inputs[0]
            if weight is None or not weight.is_initializer() or len(weight.shape or ()) != 2:
                declined.append((node, "not a stored matrix"))
                continue
            self._fold(graph, node, weight)
            folded.append(node)
        return report(self, model, folded, declined)

    @staticmethod
    def _is_plain_gemm(node: ir.Node) -> bool:
        """X W^T of a weight, which is how torch writes a linear layer on two-dimensional input."""
        if node.op_type != "Gemm" or len(node.inputs) > 2 or node.inputs[1] is None:
            return False
        wanted = {"transA": 0, "transB": 1, "alpha": 1.0}
        given = {name: node.attributes[name].value for name in wanted if name in node.attributes}
        return node.inputs[1].is_initializer() and {"transA": 0, "transB": 0, "alpha": 1.0} | given == wanted

    @staticmethod
    def _unfold_gemm(graph: ir.Graph, node: ir.Node) -> None:
        build = Builder(str(node.name))
        y = build("MatMul", node.inputs[0], build("Transpose", node.inputs[1], perm=[1, 0]))
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, node.outputs, [y])

    def _fold(self, graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
        assert weight.const_value is not None, f"{weight.name} has no value yet: bind weights before lowering"
        tensor = transposed(weight.const_value)
        folded = ir.Value(
            name=f"{weight.name}.T", shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(folded)
        node.outputs[0].replace_all_uses_with(folded)
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[str(weight.name)]
