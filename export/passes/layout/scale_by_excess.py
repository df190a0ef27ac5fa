"""Factors that are 1 and something, in 16 bits: the temperature of queries on a GPU.

    round(float32(x) · (1 + a))   ->   x + x · round(a)

Rounded to bfloat16, 1 + a is off by up to 0.4 %; a itself is off by as much of *a*, which is a few percent. So x never
leaves its 16 bits, and a cast, a product and a cast become a product and a sum. Where a is 0, nothing changes x.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from ...graph.builder import Builder
from ..native._matching import made_by, only_user, other_input
from ..report import report

_VIEWS = ("Unsqueeze", "Squeeze", "Reshape")


class ScaleByExcess(InPlacePass):
    """Multiply 16-bit values by what a float32 factor per token has above 1; runs after ``ComputeIn``."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        found = [scaling for node in model.graph if node.op_type == "Mul" and (scaling := _scaling_of(node))]
        excesses: dict[ir.Value, ir.Value] = {}
        for scaling in found:
            _rewrite(model.graph, scaling, excesses)
        if found:
            common.RemoveUnusedNodesPass()(model)
        return report(self, model, [scaling.back for scaling in found])


class _Scaling(NamedTuple):
    """A product of activations with a factor per token.

    Attributes:
        x: the activations, in 16 bits.
        factor: 1 + a.
        excess: a.
        product: the ``Mul``, in float32.
        back: the ``Cast`` of its result to the type of x.
    """

    x: ir.Value
    factor: ir.Value
    excess: ir.Value
    product: ir.Node
    back: ir.Node


def _scaling_of(product: ir.Node) -> _Scaling | None:
    back = only_user(product.outputs[0], "Cast")
    for widened, column in (product.inputs, product.inputs[::-1]):
        cast = made_by(widened, "Cast")
        if back is None or cast is None or made_by(column, "Unsqueeze") is None:
            continue
        x, factor = cast.inputs[0], _unviewed(column)
        excess = _excess_of(factor)
        if x is not None and factor is not None and excess is not None and x.dtype == back.outputs[0].dtype:
            return _Scaling(x, factor, excess, product, back)
    return None


def _rewrite(graph: ir.Graph, found: _Scaling, excesses: dict[ir.Value, ir.Value]) -> None:
    """Rewrite a product; layers share ``excesses``, a in 16 bits, by the value 1 + a."""
    build, x = Builder(f"{found.product.name}/excess"), found.x
    assert x.dtype is not None
    if found.factor not in excesses:
        column = build("Reshape", found.excess, build.constant([-1, 1]))
        excesses[found.factor] = build("Cast", column, to=x.dtype)
        for value, dtype in ((column, ir.DataType.FLOAT), (excesses[found.factor], x.dtype)):
            value.type, value.shape = ir.TensorType(dtype), ir.Shape([*(x.shape or ())[:1], 1])
    more = build("Mul", x, excesses[found.factor])
    scaled = build("Add", x, more)
    for value in (more, scaled):
        value.type, value.shape = x.type, x.shape
    back = found.back
    ir.convenience.replace_nodes_and_values(graph, back, [back], build.nodes, back.outputs, [scaled])


def _unviewed(value: ir.Value | None) -> ir.Value | None:
    """The value that another one is a view of."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _VIEWS and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _excess_of(value: ir.Value | None) -> ir.Value | None:
    """a, of a value that is made as 1 + a."""
    add = made_by(value, "Add")
    for one in add.inputs if add is not None else ():
        node = made_by(one, "Constant")
        tensor = node.attributes["value"].as_tensor() if node is not None and "value" in node.attributes else None
        tensor = one.const_value if one is not None and one.is_initializer() else tensor
        if add is not None and one is not None and tensor is not None and np.all(tensor.numpy() == 1):
            return other_input(add, one)
    return None
