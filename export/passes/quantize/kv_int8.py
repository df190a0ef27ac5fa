"""Keys and values stored in 8 bits: a quarter of the memory, and a quarter of what a token reads of a long context.

    one token      GroupQueryAttention on the int8 cache, which it reads as it is
    more tokens    GroupQueryAttention in float32 on the dequantised cache; what it appended is quantised again

The operator's int8 form is the faster of the two for a token and five times slower for a prompt. Quantising the
dequantised past gives the codes that were there, so both forms keep the same cache.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from ...graph.builder import Builder
from ..report import report
from ._caches import CachesPass, layer_of
from ._tensors import scalar

HEADROOM = 1.1
"""Largest magnitude that fits, relative to the largest seen in calibration; beyond it values saturate."""
_SCALES_AT = 12
"""Position of key and value scales among the inputs of ``GroupQueryAttention``."""


class QuantizeCaches(CachesPass):
    """Turn the caches of ``GroupQueryAttention`` into int8, with one scale for keys and one for values per layer."""

    dtype = ir.DataType.INT8

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph and the types of its cache inputs and outputs."""
        found = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
        if found:
            build = Builder("cache.int8")
            tokens_1 = build("Shape", found[0].inputs[0], start=1, end=2)
            is_token = build("Equal", build("Squeeze", tokens_1), build.constant(1))
            is_token.type, is_token.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
            model.graph.insert_before(found[0], build.nodes)
        for node in found:
            self._replace(model.graph, node, is_token)
        self.set_type(*(value for value in (*model.graph.inputs, *model.graph.outputs)
                        if re.match(r"(past|present)\.\d+\.", str(value.name))))
        return report(self, model, found)

    def _replace(self, graph: ir.Graph, node: ir.Node, is_token: ir.Value) -> None:
        past = node.inputs[3]
        assert past is not None
        amaxes = self.calibration.required_kv_amax(layer_of(past), observer="max")
        scales = [amax * HEADROOM / 127 for amax in amaxes]
        build = Builder(f"{node.name}/int8")
        outputs = build.branch(is_token, partial(_token, node=node, scales=scales),
                               partial(_prompt, node=node, scales=scales), outputs=3)
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, node.outputs, outputs)


def _token(build: Builder, node: ir.Node, scales: list[float]) -> tuple[ir.Value, ...]:
    """Attention of one token on the int8 caches; returns its output and the caches."""
    constants = [build("Constant", value=ir.Tensor(np.asarray([scale], np.float32))) for scale in scales]
    inputs = [*node.inputs, *[None] * (_SCALES_AT - len(node.inputs)), *constants]
    outputs: tuple[ir.Value, ...] = build(
        "GroupQueryAttention", *inputs, outputs=3, domain=node.domain, k_quant_type="PER_TENSOR",
        v_quant_type="PER_TENSOR", kv_cache_bit_width=8, **_attributes(node),
    )
    return outputs


def _prompt(build: Builder, node: ir.Node, scales: list[float]) -> tuple[ir.Value, ...]:
    """Attention of several tokens on dequantized copies of the caches; returns its output and the caches."""
    q, k, v, *pasts, last_B, longest = node.inputs
    used_1 = build("Reshape", build("Cast", longest, to=ir.DataType.INT64), build.constant([1]))
    axis, end = build.constant([2]), build.constant([np.iinfo(np.int64).max])
    steps = [scalar(build, scale) for scale in scales]
    exact = [
        build("DequantizeLinear", build("Slice", past, build.constant([0]), used_1, axis), step)
        for past, step in zip(pasts, steps, strict=True)
    ]
    y, *presents = build("GroupQueryAttention", q, k, v, *exact, last_B, longest, outputs=3, domain=node.domain,
                         **_attributes(node))
    rest = [build("Slice", past, used_1, end, axis) for past in pasts]
    codes = [
        build("QuantizeLinear", present, step, output_dtype=ir.DataType.INT8)
        for present, step in zip(presents, steps, strict=True)
    ]
    return y, *(build("Concat", new, old, axis=2) for new, old in zip(codes, rest, strict=True))


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}
