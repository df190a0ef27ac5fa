"""Matrix products in FP8: input and weight through Q/DQ in the one pattern that TensorRT really runs as FP8 x FP8.

    x -> Sub(c) -> Q(s) -> DQ(s) \
                                  MatMul -> Mul(r) -> Add(c W)          all but routed experts
    W(E4M3)       -> DQ(g)       /

    x -> Mul(lift) -> Q(s) -> DQ(s), MatMul, Mul(r / lift)              routed experts

s and g are scalars, r follows as an ordinary product (``fp8_format.py`` says why).

c [K] is the centre of the input, channel by channel. E4M3 rounds every number by up to 1/16 of itself, so a channel
that is large and always nearly the same costs as much precision as one that says something. Without its centre only
what varies is rounded, and the constant c W is added exactly. An expert's centre would have to be masked where it was
not chosen.

Experts that are computed in one batched product share the scalar s, and each has a lift of its own, a power of two. It
brings the largest input of expert e, amax[e], as far up towards the largest of all experts as fits,

    s = max_e amax[e] / 448, rounded up to bfloat16          lift[e] = 2^floor(log2( max amax / amax[e] ))

so that every expert uses the whole range of E4M3, and lifting is exact in any floating-point type. An expert that has
its product to itself uses s / lift[e] as its scale, which gives the same codes.

Run in ONNX Runtime the same graph is the numeric twin of an engine: Q/DQ round exactly as E4M3 does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ....model.quantization.calibration_file import CalibrationFile, stored_name
from ....model.quantization.e4m3 import expert_input_multipliers, input_scale
from ....model.quantization.formats import Fp8Format
from ....model.quantization.recipes import Recipe
from ...graph.builder import Builder
from ...weights.fp8 import CenteringOffsets, ChannelRatios, Fp8Codes, GlobalScale


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
        found = [(graph, product) for graph in model.graphs() for node in graph if (product := self._product(node))]
        for graph, product in found:
            self._replace(graph, product)
        return PassResult(model, modified=bool(found))

    def _product(self, node: ir.Node) -> _Product | None:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None:
            return None
        gather = weight.producer()
        if gather is not None and gather.op_type == "Gather":
            weight = gather.inputs[0]
        else:
            gather = None
        if weight is None or not weight.is_initializer() or weight.const_value is None:
            return None
        layout = self.recipe.layout_of(str(weight.name))
        return _Product(node, weight, gather) if isinstance(layout, Fp8Format) else None

    def _replace(self, graph: ir.Graph, product: _Product) -> None:
        node, weight = product.node, product.weight
        scale, lift_E = scale_and_lift(self.calibration, str(weight.name))
        build = Builder(f"{node.name}/fp8")
        assert weight.const_value is not None
        centre_K = self.calibration.centre(str(weight.name))
        codes = Fp8Codes(weight.const_value, centre_K)
        batched = len(codes.source.shape) == 3
        # Codes first: writing them finds the scales.
        stored = [_stored(graph, weight, suffix, tensor) for suffix, tensor in (
            ("codes", codes), ("scale", GlobalScale(codes)),
            ("ratios", ChannelRatios(codes, lift_E if batched else None)))]
        x = node.inputs[0]
        if batched and lift_E is not None and (lift_E != 1).any():
            lift_E11 = build("Constant", value=ir.Tensor(lift_E[:, None, None]))
            x = build("Mul", x, product.chosen(build, lift_E11))
        elif lift_E is not None and not batched:
            scale /= float(lift_E)
        elif centre_K is not None:
            x = build("Sub", x, build("Constant", value=ir.Tensor(centre_K.numpy())))
        zero = build("Constant", value=_zero())
        s = build("Constant", value=ir.Tensor(np.asarray(scale, np.float32)))
        x = build("DequantizeLinear", build("QuantizeLinear", x, s, zero), s, zero)
        w = product.chosen(build, build("DequantizeLinear", *stored[:2], zero))
        y = build("Mul", build("MatMul", x, w), product.chosen(build, stored[2]))
        if centre_K is not None:
            y = build("Add", y, _stored(graph, weight, "centred", CenteringOffsets(codes)))
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


def scale_and_lift(calibration: CalibrationFile, weight: str) -> tuple[float, np.ndarray | None]:
    """The scalar scale s of a product's input, and for experts the lifts: [E] for all, a number for one of them.

    Args:
        calibration: largest inputs.
        weight: name of the weight in the graph.
    """
    name, expert = stored_name(weight)
    amax = calibration.input_amax(name)
    if amax.ndim == 0:
        return input_scale(float(amax)), None
    lift_E = expert_input_multipliers(amax)
    scale = input_scale(float(amax.max()))
    return scale, lift_E if expert is None else lift_E[expert]


def _stored(graph: ir.Graph, weight: ir.Value, suffix: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer, named after the weight that it replaces."""
    value = ir.Value(name=f"{weight.name}.{suffix}", shape=ir.Shape(tensor.shape.numpy()),
                     type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _zero() -> ir.TensorProtocol:
    return ir.Tensor(np.zeros((), ir.DataType.FLOAT8E4M3FN.numpy()), dtype=ir.DataType.FLOAT8E4M3FN)
