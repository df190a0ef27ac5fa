"""FP8 matrix products in ONNX graphs: how they are recognised, and those that TensorRT would silently get wrong.

    x -> QuantizeLinear(s) -> DequantizeLinear(s) \
                                                   MatMul
              W (E4M3) -> DequantizeLinear(g)     /          a Gather of experts may stand behind the weight's

Only with scalar, constant s and g does TensorRT-RTX 1.7 compute such a product as FP8 x FP8 with the right scale. What
it makes of the other forms was read in the code of its plans; none of them is an error to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from ....errors import HerdError

_E4M3 = ir.DataType.FLOAT8E4M3FN
_LAYOUT_ONLY = ("Gather", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
"""Operators between a DequantizeLinear and a product that leave the product in FP8."""


@dataclass(frozen=True)
class Fp8Product:
    """Operands of an ONNX product that come out of FP8."""

    node: ir.Node
    quantized: tuple[ir.Node, ir.Node]
    """The two ``DequantizeLinear``, input first."""

    @property
    def scale(self) -> float | None:
        """What the sums of codes have to be multiplied by, None unless both scales are scalar constants."""
        scales = [scalar(node.inputs[1]) for node in self.quantized]
        return None if None in scales else math.prod(scale for scale in scales if scale is not None)


def refuse_wrong_patterns(model: ir.Model) -> None:
    """Refuse quantised products that TensorRT-RTX 1.7 builds without an error and computes otherwise.

    Raises:
        HerdError: names the first of them, and what to write instead.
    """
    for product in filter(None, map(fp8_product, model.graph)):
        if problem := _wrong_pattern(product):
            raise HerdError(f"{product.node.name}: {problem}; use one scalar constant scale, and multiply the result "
                            "by ratios")


def _wrong_pattern(product: Fp8Product) -> str:
    what = ("input", "weight")
    for name, node in zip(what, product.quantized, strict=True):
        scale = node.inputs[1]
        if "block_size" in node.attributes and node.attributes["block_size"].as_int():
            return f"the {name}'s scales are per block, TensorRT reads the first block's for all"
        if scale is None or not _is_constant(scale):
            return f"the {name}'s scale is no constant, TensorRT computes such a product in 16 bits"
        if scalar(scale) is None and (axis := _axis(node)) != "output":
            return f"the {name}'s scales are per {axis}, TensorRT computes such a product in 16 bits"
        if scalar(scale) is None and scale.dtype == ir.DataType.FLOAT16:
            return f"the {name}'s scales are per output channel, sums of codes overflow float16"
    return ""


def _axis(node: ir.Node) -> str:
    """What the scales of a ``DequantizeLinear`` are for."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    rank = len(shape) if shape is not None else 2
    axis = node.attributes["axis"].as_int() % rank if "axis" in node.attributes else 1
    return {rank - 1: "output", rank - 2: "input channel"}.get(axis, "expert")


def fp8_product(node: ir.Node) -> Fp8Product | None:
    """The product that a node is, None when it is not one of two FP8 operands."""
    if node.op_type != "MatMul":
        return None
    sources = [_dequantize(value) for value in node.inputs]
    if len(sources) != 2 or sources[0] is None or sources[1] is None:
        return None
    return Fp8Product(node, (sources[0], sources[1]))


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    """The ``DequantizeLinear`` of FP8 codes that a value comes from."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _LAYOUT_ONLY:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return None
    codes = node.inputs[0]
    quantize = codes.producer() if codes is not None else None
    zero = quantize.inputs[2] if quantize is not None and len(quantize.inputs) > 2 else codes
    return node if zero is not None and _E4M3 in (zero.dtype, _constant_type(zero)) else None


def _constant_type(value: ir.Value) -> ir.DataType | None:
    tensor = constant(value)
    return tensor.dtype if tensor is not None else None


def constant(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of a constant or an initializer, None for what is computed or given."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
        return producer.attributes["value"].as_tensor()
    return value.const_value


def _is_constant(value: ir.Value) -> bool:
    return constant(value) is not None


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds, None for anything else."""
    tensor = constant(value) if value is not None else None
    if tensor is None or tensor.size != 1:
        return None
    return float(tensor.numpy().astype("float32").item())
