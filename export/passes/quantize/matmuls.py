"""Matrix products with quantised weights, their inputs quantised to 8 bits on the way.

Weights in blocks (``BlockFormat``) become ``MatMulNBits``, which quantises its input in the same blocks; where they are
centered, as GPUs want them, its input stays in floating point.

Weights with a scale per output channel (``ChannelFormat``) become one integer product. Its input is quantised by row:

    m[t] = max_k |x[t, k]|       q[t, k] = round(127 x[t, k] / m[t]) + 128         uint8, 128 stands for zero
    y[t, n] = m[t] / 127 · s[n] · sum_k (q[t, k] - 128) c[k, n]

so that a token's result does not depend on the other tokens of its call.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ....model.quantization.calibration_file import CalibrationFile
from ....model.quantization.formats import BlockFormat, ChannelFormat, Fp8Format
from ....model.quantization.recipes import Recipe
from ...graph.builder import CONTRIB, Builder
from ...weights.block import BlockCodes, BlockScales, BlockZeros
from ...weights.channel import ChannelCodes, ChannelScales
from ...weights.origin import origin_of
from ..report import report
from ._hessians import hessian_of
from ._tensors import add_initializer, scalar

_FLOAT_ACTIVATIONS, _INT8_ACTIVATIONS = 0, 4
"""``accuracy_level`` of ``MatMulNBits``: products of floats, or of 8-bit integers, inputs quantised in blocks as the
weights are."""


class QuantizeMatMuls(InPlacePass):
    """Replace every ``MatMul`` whose weight the recipe quantises, in the experts' branches too.

    Args:
        recipe: says which weight is stored how.
        calibration: Hessians of inputs.
    """

    def __init__(self, recipe: Recipe, calibration: CalibrationFile | None = None) -> None:
        super().__init__()
        self.recipe, self.calibration = recipe, calibration
        self._inputs: dict[tuple[int, int], tuple[ir.Value, ir.Value]] = {}
        """Quantized inputs by graph and value: products that read one input share them."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite all graphs of the model."""
        found = [(graph, node, layout) for graph in model.graphs() for node in graph if (layout := self._layout(node))]
        for graph, node, layout in found:
            self._replace(graph, node, layout)
        if found:
            model.opset_imports[CONTRIB] = 1
        rewritten = {id(node) for _, node, _ in found}
        floats = [(node, "the recipe keeps floats") for graph in model.graphs() for node in graph
                  if node.op_type == "MatMul" and id(node) not in rewritten]
        return report(self, model, [node for _, node, _ in found], floats)

    def _layout(self, node: ir.Node) -> BlockFormat | ChannelFormat | None:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            return None
        layout = self.recipe.layout_of(*origin_of(weight.const_value).names) if weight.is_initializer() else None
        return None if isinstance(layout, Fp8Format) else layout

    def _replace(self, graph: ir.Graph, node: ir.Node, layout: BlockFormat | ChannelFormat) -> None:
        x, weight = node.inputs
        assert x is not None
        assert weight is not None
        assert weight.const_value is not None
        build = Builder(f"{node.name}/quantised")
        if isinstance(layout, BlockFormat):
            y = self._blocks(build, graph, x, weight, layout)
        else:
            y = self._channels(build, graph, x, weight, layout)
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, node.outputs, [y])
        if not weight.uses():
            del graph.initializers[str(weight.name)]

    def _blocks(self, build: Builder, graph: ir.Graph, x: ir.Value, weight: ir.Value, layout: BlockFormat) -> ir.Value:
        assert weight.const_value is not None
        inputs, channels = weight.const_value.shape.numpy()
        codes = BlockCodes(weight.const_value, layout, hessian_of(weight.const_value, layout, self.calibration))
        # Codes first: writing them finds the scales and zero points.
        tensors: dict[str, ir.TensorProtocol] = {"codes": codes, "scales": BlockScales(codes)}
        if layout.bits == 4 and not layout.centered:
            tensors["zeros"] = BlockZeros(codes)
        stored = [add_initializer(graph, weight, *each) for each in tensors.items()]
        return build("MatMulNBits", x, *stored, domain=CONTRIB, K=inputs, N=channels,
                     bits=layout.bits, block_size=layout.block,
                     accuracy_level=_FLOAT_ACTIVATIONS if layout.centered else _INT8_ACTIVATIONS)

    def _channels(
        self, build: Builder, graph: ir.Graph, x: ir.Value, weight: ir.Value, layout: ChannelFormat
    ) -> ir.Value:
        assert weight.const_value is not None
        codes = ChannelCodes(weight.const_value, hessian_of(weight.const_value, layout, self.calibration))
        codes_KN = add_initializer(graph, weight, "codes", codes)
        scales_N = add_initializer(graph, weight, "scales", ChannelScales(codes))
        step, zero = scalar(build, 1 / 127), build("Constant", value=ir.Tensor(np.asarray(128, np.uint8)))
        key = id(graph), id(x)
        if key not in self._inputs:
            amax = build("ReduceMax", build("Abs", x), build.constant([-1]), keepdims=1)
            # A row of zeros gives 0 / 0; whatever code that becomes, it is multiplied by the row's amax of 0.
            self._inputs[key] = build("QuantizeLinear", build("Div", x, amax), step, zero), amax
        q, amax = self._inputs[key]
        y = build("MatMulIntegerToFloat", q, codes_KN, step, scales_N, zero, zero, domain=CONTRIB)
        return build("Mul", y, amax)
