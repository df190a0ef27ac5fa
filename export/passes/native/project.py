"""Matrix products as our own ``Project``: norm, quantisation, product, bias, GELU and residual in one operator.

    y = [r +] [gelu](W [norm](x) [+ b])

A norm goes into every product that reads it; what is added and applied behind a product goes into the product.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from ....model.quantization.calibration_file import CalibrationFile
from ....model.quantization.recipes import Recipe
from ...graph.builder import Builder
from ...weights.packed import format_number
from ..report import report
from ._matching import addition_of, layer_norm_of, norm_of, only_user, other_input, weight_of
from ._weights import DOMAIN, Packer, take_place

GELU = 1
"""The number of the exact GELU (``Activation`` in kernels.h)."""


class LowerProjects(InPlacePass):
    """Replace every ``MatMul`` of the main graph whose weight our operators can store.

    Args:
        recipe: says which weight is stored how.
        calibration: Hessians of inputs.
    """

    def __init__(self, recipe: Recipe, calibration: CalibrationFile | None = None) -> None:
        super().__init__()
        self.packer = Packer(recipe, calibration)

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        products = [(node, weight) for node in model.graph if (weight := weight_of(node))]
        found = [(node, weight) for node, weight in products
                 if weight.const_value is not None and self.packer.can_pack(weight.const_value)]
        for node, weight in found:
            self._replace(model.graph, node, weight)
        if found:
            model.opset_imports[DOMAIN] = 1
            common.RemoveUnusedNodesPass()(model)
        taken = {node for node, _ in found}
        declined = [(node, "our operators do not have the format in which the recipe stores it") for node, _ in products
                    if node not in taken]
        return report(self, model, [node for node, _ in found], declined)

    def _replace(self, graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
        assert weight.const_value is not None
        build, layout = Builder(str(node.name)), self.packer.layout_of(weight.const_value)
        stored = self.packer.matrix(build, "weight", weight.const_value, layout)
        norm = norm_of(node.inputs[0]) or layer_norm_of(node.inputs[0])
        x, gain, epsilon, shift = norm or (node.inputs[0], None, 0.0, None)
        biased, bias = _with_bias(node)
        active = _with_gelu(biased)
        last, residual = _with_residual(active)
        y = build("Project", x, *stored, gain, residual, *((shift, bias) if shift or bias else ()), domain=DOMAIN,
                  format=format_number(layout), channels=int(weight.const_value.shape.numpy()[1]),
                  epsilon=float(epsilon), **({"activation": GELU} if active is not biased else {}))
        y.shape, y.type = last.outputs[0].shape, last.outputs[0].type
        take_place(graph, last, build, y)


def _with_bias(node: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The node after which a bias has been added, and the bias."""
    add = only_user(node.outputs[0], "Add")
    parts = addition_of(add.outputs[0]) if add is not None else None
    return (add, parts[1]) if add is not None and parts is not None and parts[0] is node.outputs[0] else (node, None)


def _with_gelu(node: ir.Node) -> ir.Node:
    """The exact GELU of a node's result, or the node."""
    gelu = only_user(node.outputs[0], "Gelu")
    return gelu if gelu is not None and gelu.attributes.get_string("approximate", "none") == "none" else node


def _with_residual(node: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The node that ends the operator, and what it adds: a value of the residual stream, never a constant."""
    add = only_user(node.outputs[0], "Add")
    residual = other_input(add, node.outputs[0]) if add is not None else None
    if add is None or residual is None or residual.is_initializer() or residual.shape is None:
        return node, None
    if residual.shape != add.outputs[0].shape:
        return node, None
    return add, residual
