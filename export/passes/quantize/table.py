"""The embedding table in 8 bits, with a scale for every token.

    x[t] = s[id_t] · c[id_t]        c int8 [V, D], s float32 [V, 1]

Only the rows of the tokens at hand are read and turned into floats, so what it costs does not grow with the table.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ....model.quantization.formats import ChannelFormat
from ....model.quantization.recipes import EMBEDDING, Recipe
from ...graph.builder import Builder
from ...weights.channel import RowCodes, RowScales
from ...weights.origin import origin_of
from ..report import report
from ._tensors import add_initializer


class QuantizeTable(InPlacePass):
    """Replace every ``Gather`` of rows of the embedding table, if the recipe stores it in 8 bits.

    Args:
        recipe: says how the table is stored.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        found = [node for node in model.graph if self._applies(node)]
        for node in found:
            self._replace(model.graph, node)
        return report(self, model, found)

    def _applies(self, node: ir.Node) -> bool:
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or not table.is_initializer() or table.const_value is None:
            return False
        is_embedding = origin_of(table.const_value).name == EMBEDDING
        return is_embedding and isinstance(self.recipe.embedding_layout, ChannelFormat)

    @staticmethod
    def _replace(graph: ir.Graph, node: ir.Node) -> None:
        table, ids = node.inputs
        assert table is not None
        assert table.const_value is not None
        build, codes = Builder(f"{node.name}/quantised"), RowCodes(table.const_value)
        # Codes first: writing them finds the scales.
        stored = [add_initializer(graph, table, suffix, tensor)
                  for suffix, tensor in (("codes", codes), ("scales", RowScales(codes)))]
        rows, scales = (build("Gather", each, ids, axis=0) for each in stored)
        x = build("Mul", build("Cast", rows, to=ir.DataType.FLOAT), scales)
        x.shape, x.type = node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, node.outputs, [x])
        if not table.uses():
            del graph.initializers[str(table.name)]
