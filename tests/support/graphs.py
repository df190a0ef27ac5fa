"""Small ONNX graphs for pass tests: text in, numbers out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from herdgraph.export.graph.functions import reference_functions
from herdgraph.model.llama4.operators import OPSET
from herdgraph.runtimes.native.library import library_path

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
    if "herdgraph.cpu" in model.opset_imports:
        options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


def operators(model: ir.Model) -> Counter[str]:
    """How often each operator occurs in a model, subgraphs included."""
    return Counter(node.op_type for node in model.graph.all_nodes())

TRT_MOE = f"""
<opset_import: ["" : {OPSET}], domain: "trt">
TRT_MoE <activation_type, quantization_dtype> (x_A1D, expert_A11, score_A11, gate_EDF, up_EDF, down_EFD) => (y_A1D) {{
    one_dim = Constant <value_ints = [-1]> ()
    expert_A = Reshape (expert_A11, one_dim)
    gate_ADF = Gather (gate_EDF, expert_A)
    up_ADF = Gather (up_EDF, expert_A)
    down_AFD = Gather (down_EFD, expert_A)
    gate = MatMul (x_A1D, gate_ADF)
    sigmoid = Sigmoid (gate)
    silu = Mul (gate, sigmoid)
    up = MatMul (x_A1D, up_ADF)
    hidden = Mul (silu, up)
    y = MatMul (hidden, down_AFD)
    y_A1D = Mul (y, score_A11)
}}
"""
