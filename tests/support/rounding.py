"""A graph in bfloat16 as one in float32 that rounds what every node gives: a CPU has no kernels for the type."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from herdgraph.export.graph.builder import Builder

BF16, F32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT
_MOVES = {"Constant", "Squeeze", "Unsqueeze", "Reshape", "Split", "Gather", "Where", "Transpose", "Concat", "Slice"}
"""Operators that give what they were given."""


def emulate(model: ir.Model) -> ir.Model:
    """Rewrite a model in place; returns it. Caches are float32 and hold values that were not rounded once more."""
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype == BF16:
            assert value.const_value is not None
            value.const_value, value.dtype = _widened(value.const_value), F32
    for value in graph.inputs:
        value.dtype = F32 if value.dtype == BF16 else value.dtype
    for node in list(graph):
        if node.op_type == "Constant" and node.outputs[0].dtype == BF16:
            node.attributes["value"] = ir.AttrTensor("value", _widened(node.attributes["value"].as_tensor()))
        if node.op_type == "Cast" and node.attributes["to"].as_int() == BF16:
            node.attributes["to"] = ir.AttrInt64("to", F32)
        for output in node.outputs:
            if output.dtype == BF16:
                output.dtype = F32
                if output.uses() and node.op_type not in _MOVES and not output.is_graph_output():
                    _round(graph, node, output)
    return model


def _widened(tensor: ir.TensorProtocol) -> ir.Tensor:
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    users, build = list(value.uses()), Builder(f"{value.name}/rounded")
    again = build("Cast", build("Cast", value, to=BF16), to=F32)
    for user, index in users:
        user.replace_input_with(index, again)
    graph.insert_after(node, build.nodes)
