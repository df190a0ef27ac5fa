"""A list of tokens and the batch of one row that holds it differ by an axis, and no size has to be known to add it."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ...graph.builder import Builder
from ..native._matching import made_by
from ..report import report


class ReshapeRows(InPlacePass):
    """Replace every ``Reshape`` between [1, tokens, ...] and [tokens, ...] by ``Squeeze`` or ``Unsqueeze``.

    The shapes that ``Reshape`` reads are computed from sizes of inputs. Where nothing else needs them, nothing is left
    to be computed on the host between nodes that run on a GPU.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph; runs after ``PackTokens``."""
        graph = model.graph
        reshapes = [node for node in graph if node.op_type == "Reshape"]
        found = [(node, op_type) for node in reshapes if (op_type := _operator(node))]
        for node, op_type in found:
            build = Builder(f"{node.name}/row")
            y = build(op_type, node.inputs[0], build.constant([0]))
            y.type, y.shape = node.outputs[0].type, node.outputs[0].shape
            ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, node.outputs, [y])
        for node in [node for node in graph if node.op_type == "Squeeze"]:
            self._cancel(node)
        return report(self, model, [node for node, _ in found])

    @staticmethod
    def _cancel(squeeze: ir.Node) -> None:
        """Let readers of a row that is a list again read the list."""
        unsqueeze = made_by(squeeze.inputs[0], "Unsqueeze")
        if unsqueeze is not None and unsqueeze.inputs[0] is not None and not squeeze.outputs[0].is_graph_output() and (
                unsqueeze.inputs[0].shape is not None and unsqueeze.inputs[0].shape == squeeze.outputs[0].shape):
            squeeze.outputs[0].replace_all_uses_with(unsqueeze.inputs[0])


def _operator(reshape: ir.Node) -> str | None:
    """What does the same to the shape, None where that is another change."""
    value = reshape.inputs[0]
    before, after = value.shape if value is not None else None, reshape.outputs[0].shape
    if before is None or after is None or "tokens" not in {str(dim) for dim in before}:
        return None
    if list(before) == [1, *after]:
        return "Squeeze"
    return "Unsqueeze" if [1, *before] == list(after) else None
