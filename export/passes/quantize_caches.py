"""Keys and values stored in 8 bits: a quarter of the memory, and a quarter of what a token reads of a long context."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ...errors import HerdError
from ..builder import Builder
from ..moments import MomentsFile

HEADROOM = 1.1
"""Largest magnitude that fits, relative to the largest seen in calibration; beyond it values saturate."""
_SCALES_AT = 12
"""Position of key and value scales among the inputs of ``GroupQueryAttention``."""


class QuantizeCaches(InPlacePass):
    """Turn the caches of ``GroupQueryAttention`` into int8, with one scale for keys and one for values per layer.

    Args:
        moments: a calibration file with the largest magnitudes of keys and values.
    """

    def __init__(self, moments: MomentsFile) -> None:
        super().__init__()
        self.moments = moments

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph and the types of its cache inputs and outputs."""
        found = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
        for node in found:
            self._replace(model.graph, node)
        for value in (*model.graph.inputs, *model.graph.outputs):
            if re.match(r"(past|present)\.\d+\.", str(value.name)):
                value.type = ir.TensorType(ir.DataType.INT8)
        return PassResult(model, modified=bool(found))

    def _replace(self, graph: ir.Graph, node: ir.Node) -> None:
        past = node.inputs[3]
        assert past is not None
        layer = int(str(past.name).split(".")[1])
        build = Builder(f"{node.name}/int8")
        scales = [
            build("Constant", value=ir.Tensor(np.asarray([amax * HEADROOM / 127], np.float32)))
            for amax in self._largest(layer)
        ]
        inputs = [*node.inputs, *[None] * (_SCALES_AT - len(node.inputs)), *scales]
        outputs = build(
            "GroupQueryAttention", *inputs, outputs=3, domain=node.domain, k_quant_type="PER_TENSOR",
            v_quant_type="PER_TENSOR", kv_cache_bit_width=8,
            **{name: attribute.value for name, attribute in node.attributes.items()},
        )
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, node.outputs, outputs)

    def _largest(self, layer: int) -> tuple[float, float]:
        found = self.moments.largest(layer)
        if found is None:
            raise HerdError(f"{self.moments.path} has no magnitudes of keys and values: write it again with "
                            "`herdgraph calibrate`")
        return found
