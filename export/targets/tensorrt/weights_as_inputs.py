r"""One small plan for all layers of a shape: weights leave the graph and become inputs.

TensorRT-RTX cannot refit a plan on a CPU, and a plan's constants cannot be replaced. But FP8 codes may be inputs of a
network, provided that the scales at the Q/DQ are constants; so those become 1, and what they stood for moves outside:

    x · p / s  ->  Q(1) -> DQ(1) \
                                  MatMul  ->  · (r · s · g) / p  ->  + what outlier channels add
    W (input)  ->  DQ(1)         /

p is an expert's input multiplier, 1 where it has none. ``<weight>.input_multiplier`` (p / s), ``.ratios``,
``.outliers`` and ``.outlier_weights`` are inputs too, floats in float32. Sums of codes reach K · 448², which bfloat16
holds and float16 does not. Norms and routers follow, so that nothing of a layer is left inside.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ...graph.builder import Builder
from ...weights.origin import origin_of, with_origin
from .fp8_products import Fp8Product, constant, fp8_product, scalar

_SMALL = ("norm", "layernorm", "router")
"""Words of the names of other weights that belong to a layer."""


class WeightsAsInputs(InPlacePass):
    """Turn FP8 weights, their factors, norms and routers into inputs; runs after ``QuantizeFp8``, before ``ComputeIn``.

    Attributes:
        weights: what has to be given for each new input, unread if it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, ir.TensorProtocol] = {}
        self._one: ir.Value | None = None

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        graph = model.graph
        products = [product for node in graph if (product := fp8_product(node)) is not None]
        if products:
            build = Builder("weights_as_inputs")
            self._one = build("Constant", value=ir.Tensor(np.float32(1)))
            graph.insert_before(graph[0], build.nodes)
        for product in products:
            self._free(graph, product)
        for name, value in list(graph.initializers.items()):
            if any(word.endswith(_SMALL) for word in name.split(".")) and value.const_value is not None:
                self._give(graph, value, name, value.const_value)
        return PassResult(model, modified=bool(self.weights))

    def _free(self, graph: ir.Graph, product: Fp8Product) -> None:
        given, weight = product.quantized
        codes, scale = weight.inputs[0], product.scale
        assert codes is not None
        assert codes.const_value is not None
        assert scale is not None, f"{product.node.name} has scales of many elements"
        name = str(codes.name).removesuffix(".codes")
        s = scalar(given.inputs[1])
        assert s is not None
        self._prepare(graph, given, name, s)
        g = weight.inputs[1]
        for node in (given, weight):
            node.replace_input_with(1, self._one)
        if g is not None and g.is_initializer() and not g.uses():
            del graph.initializers[str(g.name)]
        self._give(graph, codes, str(codes.name), codes.const_value)
        (multiply,) = product.node.outputs[0].consumers()
        ratios = _root(multiply.inputs[1])
        assert ratios.const_value is not None
        self._give(graph, ratios, f"{name}.ratios", Scaled(ratios.const_value, scale))
        for suffix in (".outliers", ".outlier_weights"):
            added = graph.initializers.get(f"{name}{suffix}")
            if added is not None and added.const_value is not None:
                self._give(graph, added, str(added.name), added.const_value)

    def _prepare(self, graph: ir.Graph, dequantize: ir.Node, name: str, s: float) -> None:
        """Divide what is quantised by s, in its input multiplier where it has one."""
        codes = dequantize.inputs[0]
        quantize = codes.producer() if codes is not None else None
        assert quantize is not None, f"the input of {dequantize.name} is not quantised in the graph"
        quantize.replace_input_with(1, self._one)
        x = quantize.inputs[0]
        assert x is not None
        if (multiply := _with_constants(x, "Mul")) is not None:
            self._replace(graph, multiply, f"{name}.input_multiplier", 1 / s)
            return
        build = Builder(f"{quantize.name}/input_multiplier")
        multiplier = ir.Value(shape=ir.Shape((1,)), type=ir.TensorType(ir.DataType.FLOAT))
        self._give(graph, multiplier, f"{name}.input_multiplier", ir.Tensor(np.asarray([1 / s], np.float32)))
        quantize.replace_input_with(0, build("Mul", x, multiplier))
        graph.insert_before(quantize, build.nodes)

    def _replace(self, graph: ir.Graph, user: ir.Node, name: str, factor: float) -> None:
        """Give a node's constants, times a factor, as an input. Others may read the same constants: they stay."""
        tensor = constant(_root(user.inputs[1]))
        assert tensor is not None
        given = ir.Value(shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype))
        self._give(graph, given, name, Scaled(tensor, factor))
        gather = user.inputs[1].producer() if user.inputs[1] is not None else None
        if gather is not None and gather.op_type == "Gather":
            build = Builder(f"{user.name}/given")
            given = build("Gather", given, gather.inputs[1], axis=0)
            graph.insert_before(user, build.nodes)
        user.replace_input_with(1, given)

    def _give(self, graph: ir.Graph, value: ir.Value, name: str, tensor: ir.TensorProtocol) -> None:
        """Make a value an input of the graph."""
        if value.is_initializer():
            del graph.initializers[str(value.name)]
            value.const_value = None
        value.name = name
        graph.inputs.append(value)
        self.weights[name] = tensor


def _root(value: ir.Value | None) -> ir.Value:
    """A value, or what it is gathered from by expert."""
    assert value is not None
    producer = value.producer()
    gathered = producer.inputs[0] if producer is not None and producer.op_type == "Gather" else None
    return value if gathered is None else gathered


def _with_constants(value: ir.Value, op_type: str) -> ir.Node | None:
    """The node of a kind that made a value with a constant of several elements."""
    node = value.producer()
    tensor = constant(_root(node.inputs[1])) if node is not None and node.op_type == op_type else None
    return node if tensor is not None and tensor.size > 1 else None


class Scaled(ir.LazyTensor):
    """A float32 tensor times a number, computed when it is read."""

    def __init__(self, source: ir.TensorProtocol, factor: float) -> None:
        assert math.isfinite(factor)

        def values() -> ir.TensorProtocol:
            array: np.ndarray[Any, Any] = source.numpy().astype(np.float32) * np.float32(factor)
            return ir.Tensor(array)

        super().__init__(values, dtype=ir.DataType.FLOAT, shape=ir.Shape(source.shape.numpy()))
        with_origin(self, origin_of(source))
