"""Matrix products with 8-bit or 4-bit weights in blocks, and activations quantised to 8 bits on the way."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ..builder import CONTRIB, Builder
from ..quantize import BlockCodes, BlockFormat, BlockScales, BlockZeros
from ..recipes import Recipe

_INT8_ACTIVATIONS = 4
"""``accuracy_level`` of ``MatMulNBits``: products of 8-bit integers, inputs quantised in blocks as the weights are."""


class QuantizeMatMuls(InPlacePass):
    """Replace every ``MatMul`` whose weight the recipe quantises, in the experts' branches too, by ``MatMulNBits``.

    Args:
        recipe: says which weight is stored how; the numbers are those of ``export/quantize.py``.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite all graphs of the model."""
        found = [(graph, node, layout) for graph in model.graphs() for node in graph if (layout := self._layout(node))]
        for graph, node, layout in found:
            self._replace(graph, node, layout)
        if found:
            model.opset_imports[CONTRIB] = 1
        return PassResult(model, modified=bool(found))

    def _layout(self, node: ir.Node) -> BlockFormat | None:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            return None
        return self.recipe.layout_of(str(weight.name))

    def _replace(self, graph: ir.Graph, node: ir.Node, layout: BlockFormat) -> None:
        x, weight = node.inputs
        assert weight is not None
        assert weight.const_value is not None
        inputs, channels = weight.const_value.shape.numpy()
        codes = BlockCodes(weight.const_value, layout)
        # Codes first: writing them finds the scales and zero points.
        tensors: dict[str, ir.TensorProtocol] = {"codes": codes, "scales": BlockScales(codes)}
        if layout.bits == 4:
            tensors["zeros"] = BlockZeros(codes)
        values = [
            ir.Value(name=f"{weight.name}.{suffix}", shape=ir.Shape(tensor.shape.numpy()),
                     type=ir.TensorType(tensor.dtype), const_value=tensor)
            for suffix, tensor in tensors.items()
        ]
        for value in values:
            graph.register_initializer(value)
        build = Builder(f"{node.name}/quantised")
        y = build("MatMulNBits", x, *values, domain=CONTRIB, K=inputs, N=channels, bits=layout.bits,
                  block_size=layout.block, accuracy_level=_INT8_ACTIVATIONS)
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, node.outputs, [y])
        if not weight.uses():
            del graph.initializers[str(weight.name)]
