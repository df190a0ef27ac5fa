"""Matrix products with 8-bit weights in blocks, and activations quantised to 8 bits on the way."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ..builder import CONTRIB, Builder
from ..quantize import BLOCK, BlockCodes, BlockScales

_KEPT = ("router",)
"""Roles that stay float32: a router's error sends tokens to other experts."""

_INT8_ACTIVATIONS = 4
"""``accuracy_level`` of ``MatMulNBits``: products of 8-bit integers, inputs quantised in blocks as the weights are."""


class QuantizeMatMulsInt8(InPlacePass):
    """Replace every ``MatMul`` with a weight, in the experts' branches too, by ``com.microsoft.MatMulNBits``.

    The weight is quantised as ``export/quantize.py`` says. Embedding, norms and router stay float32.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite all graphs of the model."""
        found = [(graph, node) for graph in model.graphs() for node in graph if self._applies(node)]
        for graph, node in found:
            self._replace(graph, node)
        if found:
            model.opset_imports[CONTRIB] = 1
        return PassResult(model, modified=bool(found))

    def _applies(self, node: ir.Node) -> bool:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        return (
            weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 2
            and not any(role in str(weight.name).split(".") for role in _KEPT)
        )

    def _replace(self, graph: ir.Graph, node: ir.Node) -> None:
        x, weight = node.inputs
        assert weight is not None
        assert weight.const_value is not None
        inputs, channels = weight.const_value.shape.numpy()
        codes = BlockCodes(weight.const_value)
        values = [
            ir.Value(name=f"{weight.name}.{suffix}", shape=ir.Shape(tensor.shape.numpy()),
                     type=ir.TensorType(tensor.dtype), const_value=tensor)
            # Codes first: writing them finds the scales.
            for suffix, tensor in (("codes", codes), ("scales", BlockScales(codes)))
        ]
        for value in values:
            graph.register_initializer(value)
        build = Builder(f"{node.name}/int8")
        y = build("MatMulNBits", x, *values, domain=CONTRIB, K=inputs, N=channels, bits=8, block_size=BLOCK,
                  accuracy_level=_INT8_ACTIVATIONS)
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, node.outputs, [y])
        if not weight.uses():
            del graph.initializers[str(weight.name)]
