"""Constants and initializers that every quantizing pass adds to a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...graph.builder import Builder
from ...weights.origin import origin_of, with_origin


def scalar(build: Builder, value: float) -> ir.Value:
    """A float32 constant of rank 0."""
    constant: ir.Value = build("Constant", value=ir.Tensor(np.asarray(value, np.float32)))
    return constant


def e4m3_zero(build: Builder) -> ir.Value:
    """The zero point that makes a ``QuantizeLinear`` give E4M3."""
    zero = np.zeros((), ir.DataType.FLOAT8E4M3FN.numpy())
    constant: ir.Value = build("Constant", value=ir.Tensor(zero, dtype=ir.DataType.FLOAT8E4M3FN))
    return constant


def add_initializer(graph: ir.Graph, weight: ir.Value, suffix: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer that holds a part of a quantized weight: named after it, and of its origin."""
    assert weight.const_value is not None
    value = ir.Value(name=f"{weight.name}.{suffix}", shape=ir.Shape(tensor.shape.numpy()),
                     type=ir.TensorType(tensor.dtype), const_value=with_origin(tensor, origin_of(weight.const_value)))
    graph.register_initializer(value)
    return value
