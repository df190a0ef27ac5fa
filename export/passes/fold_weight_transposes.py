"""Store linear weights as the matrix product reads them."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ..weights import transposed


class FoldWeightTransposes(InPlacePass):
    """Replace ``Transpose(weight)`` by a weight that is written transposed.

    Checkpoints hold [out, in], ``MatMul`` wants [in, out]. Left in the graph, a runtime folds the transposition at
    every load, in memory. A weight that is also used as it stands (a tied embedding) is stored in both orders.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        graph, modified = model.graph, False
        for node in list(graph):
            weight = node.inputs[0] if node.op_type == "Transpose" else None
            if weight is None or not weight.is_initializer() or len(weight.shape or ()) != 2:
                continue
            self._fold(graph, node, weight)
            modified = True
        return PassResult(model, modified=modified)

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
