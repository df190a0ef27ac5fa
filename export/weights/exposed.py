"""Packed weights that whoever runs a graph may override with the same bytes in memory of its own.

An initializer that is also an input of the graph can be given by the caller. One that is not given is the file's: the
graph stays whole without us (``runtimes/executors/ort/weights.py``).
"""

from __future__ import annotations

import json

import onnx_ir as ir

from ...runtimes.executors.ort.weights import KEY


def expose_weights(model: ir.Model) -> None:
    """List a written model's packed weights among its inputs, and say where in the file they lie."""
    graph, places = model.graph, {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.dtype == ir.DataType.UINT8:
            graph.inputs.append(value)
            places[name] = [tensor.offset, tensor.length]
    if places:
        model.metadata_props[KEY] = json.dumps(places)
