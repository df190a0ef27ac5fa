"""Small ONNX graphs for pass tests: text in, numbers out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from herdgraph.export.graph.functions import reference_functions
from herdgraph.model.llama4.operators import OPSET

HEADER = f'<ir_version: 11, opset_import: ["" : {OPSET}, "herdgraph" : 1]>\n'


def parse(text: str, **weights: np.ndarray) -> ir.Model:
    """A model from ONNX text, with the herdgraph function bodies and initializers of the given names attached."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(HEADER + text))
    for value in [*model.graph.inputs]:
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = ir.Tensor(weights[value.name], name=value.name)
            model.graph.register_initializer(value)
    for function in reference_functions():
        model.functions[function.identifier()] = function
    return model


def run(model: ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    """Run a model in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


def operators(model: ir.Model) -> Counter[str]:
    """How often each operator occurs in a model, subgraphs included."""
    return Counter(node.op_type for node in model.graph.all_nodes())
