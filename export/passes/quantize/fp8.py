"""Matrix products in FP8: input and weight through Q/DQ in the one pattern that TensorRT really runs as FP8 x FP8.

    x       -> Q(s) -> DQ(s) \
                              MatMul -> Mul(r) -> Add(x_J V)            all but routed experts
    W(E4M3)     -> DQ(g)     /

    x -> Mul(p) -> Q(s) -> DQ(s), MatMul, Mul(r / p), Add(x_J V)        routed experts

s and g are scalars, r follows as an ordinary product (``export/weights/fp8.py`` says why).

J are the input's outlier channels (``model/quantization/outliers.py``), a Gather of x. The codes of W are 0 there, and
what these channels contribute is a product in 16 bits with their weights V [J, N], or [E, J, N] for experts, whose
outlier channels are those of the layer.

Experts that are computed in one batched product share the scalar s, and each has an input multiplier p of its own, a
power of two. It brings the largest input of expert e, amax[e], as far up towards the largest of all experts as fits,

    s = max_e amax[e] / 448, rounded up to bfloat16          p[e] = 2^floor(log2( max amax / amax[e] ))

so that every expert uses the whole range of E4M3, and multiplying is exact in any floating-point type. An expert that
has its product to itself uses s / p[e] as its scale, which gives the same codes.

Run in ONNX Runtime the same graph is the numeric twin of an engine: Q/DQ round exactly as E4M3 does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ....model.quantization.calibration_file import CalibrationFile
from ....model.quantization.e4m3 import expert_input_multipliers, input_scale
from ....model.quantization.formats import Fp8Format
from ....model.quantization.recipes import Recipe
from ...graph.builder import Builder
from ...weights.fp8 import ChannelRatios, Fp8Codes, GlobalScale, OutlierWeights
from ...weights.origin import Origin, origin_of
from ..report import report
from ._tensors import add_initializer, e4m3_zero, scalar


class QuantizeFp8(InPlacePass):
    """Replace every ``MatMul`` whose weight the recipe stores in FP8, in the experts' branches too.

    Args:
        recipe: says which weight is stored how.
        calibration: largest inputs.
    """

    def __init__(self, recipe: Recipe, calibration: CalibrationFile) -> None:
        super().__init__()
        self.recipe, self.calibration = recipe, calibration

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite all graphs of the model."""
        products = [(graph, node) for graph in model.graphs() for node in graph if node.op_type == "MatMul"]
        found = [(graph, product) for graph, node in products if (product := self._product(node))]
        quantized = {id(product.node) for _, product in found}
        floats = [(node, "the recipe keeps floats") for _, node in products if id(node) not in quantized]
        for graph, product in found:
            self._replace(graph, product)
        return report(self, model, [product.node for _, product in found], floats)

    def _product(self, node: ir.Node) -> _Product | None:
        weight = node.inputs[1]
        if weight is None:
            return None
        gather = weight.producer()
        if gather is not None and gather.op_type == "Gather":
            weight = gather.inputs[0]
        else:
            gather = None
        if weight is None or not weight.is_initializer() or weight.const_value is None:
            return None
        layout = self.recipe.layout_of(*origin_of(weight.const_value).names)
        return _Product(node, weight, gather) if isinstance(layout, Fp8Format) else None

    def _replace(self, graph: ir.Graph, product: _Product) -> None:
        node, weight = product.node, product.weight
        assert weight.const_value is not None
        origin = origin_of(weight.const_value)
        scale, multipliers_E = input_scale_of(self.calibration, origin)
        build = Builder(f"{node.name}/fp8")
        outliers_J = self.calibration.outliers(origin.name)
        codes = Fp8Codes(weight.const_value, partial(self.calibration.hessian, origin.name), outliers_J)
        # Codes first: writing them finds the scales.
        stored = [add_initializer(graph, weight, suffix, tensor) for suffix, tensor in (
            ("codes", codes), ("scale", GlobalScale(codes)), ("ratios", ChannelRatios(codes, multipliers_E)))]
        given = x = node.inputs[0]
        if multipliers_E is not None and (multipliers_E != 1).any():
            multipliers_E11 = build("Constant", value=ir.Tensor(multipliers_E[:, None, None]))
            x = build("Mul", x, product.chosen(build, multipliers_E11))
        zero, s = e4m3_zero(build), scalar(build, scale)
        x = build("DequantizeLinear", build("QuantizeLinear", x, s, zero), s, zero)
        w = product.chosen(build, build("DequantizeLinear", *stored[:2], zero))
        y = build("Mul", build("MatMul", x, w), product.chosen(build, stored[2]))
        if outliers_J is not None:
            outliers = build("Gather", given, add_initializer(graph, weight, "outliers", ir.Tensor(outliers_J.numpy())),
                             axis=-1)
            weights = add_initializer(graph, weight, "outlier_weights", OutlierWeights(codes))
            y = build("Add", y, build("MatMul", outliers, product.chosen(build, weights)))
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, node.outputs, [y])
        product.remove_weight(graph)


@dataclass(frozen=True)
class _Product:
    """A product with a weight, or with the weights of the experts that a ``Gather`` chooses."""

    node: ir.Node
    weight: ir.Value
    gather: ir.Node | None

    def chosen(self, build: Builder, per_expert: ir.Value) -> ir.Value:
        """What a tensor by expert is for the chosen ones."""
        return per_expert if self.gather is None else build("Gather", per_expert, self.gather.inputs[1], axis=0)

    def remove_weight(self, graph: ir.Graph) -> None:
        if self.gather is not None and not self.gather.outputs[0].uses():
            graph.remove(self.gather, safe=True)
        if not self.weight.uses():
            owner = self.weight.graph
            assert isinstance(owner, ir.Graph)
            del owner.initializers[str(self.weight.name)]


def input_scale_of(calibration: CalibrationFile, origin: Origin) -> tuple[float, np.ndarray | None]:
    """The scale s of a product's input and, for the experts of a batched product, their input multipliers [E].

    Args:
        calibration: largest inputs.
        origin: of the weight.
    """
    amax = calibration.input_amax(origin.name)
    scale = input_scale(float(amax.max()))
    if amax.ndim == 0:
        return scale, None
    multipliers_E = expert_input_multipliers(amax)
    return (scale, multipliers_E) if origin.expert is None else (scale / float(multipliers_E[origin.expert]), None)
