"""Keys and values stored in E4M3, for graphs that read the past and hand out the new (``LowerExplicitAttention``).

    past.{i}.key (E4M3) -> DQ(s) ----------------\
                                                  Concat -> Attention
    new key -> Q(s) -> new.{i}.key (E4M3) -> DQ(s) /

Attention sees its new tokens as it will see them again later, through the cache. Its arithmetic stays in floating
point: TensorRT has no fused FP8 attention for this, and Q/DQ around it would round twice for nothing.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import PassResult

from ....model.quantization.e4m3 import input_scale
from ...graph.builder import Builder
from ..report import report
from ._caches import CachesPass, layer_of
from ._tensors import e4m3_zero, scalar


class QuantizeCachesFp8(CachesPass):
    """Give caches the type E4M3, with one scale for keys and one for values per layer."""

    dtype = ir.DataType.FLOAT8E4M3FN

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the cache inputs and outputs of the main graph."""
        graph = model.graph
        pasts = [value for value in graph.inputs if str(value.name).startswith("past.")]
        outputs = {str(value.name): value for value in graph.outputs}
        for past in pasts:
            amax_key, amax_value = self.calibration.required_kv_amax(layer_of(past))
            amax = amax_key if str(past.name).endswith(".key") else amax_value
            new = outputs[str(past.name).replace("past.", "new.")]
            self._quantize(graph, past, new, input_scale(amax))
        return report(self, model, pasts)

    def _quantize(self, graph: ir.Graph, past: ir.Value, new: ir.Value, scale: float) -> None:
        """Put Q/DQ around one cache."""
        (reader, place), = past.uses()
        producer, name = new.producer(), str(new.name)
        assert producer is not None
        build = Builder(f"{past.name}/fp8")
        zero, s = e4m3_zero(build), scalar(build, scale)
        old = build("DequantizeLinear", past, s, zero)
        codes = build("QuantizeLinear", new, s, zero)
        again = build("DequantizeLinear", codes, s, zero)
        for user, index in [(user, index) for user, index in new.uses() if user.op_type == "Concat"]:
            user.replace_input_with(index, again)
        reader.replace_input_with(place, old)
        graph.insert_after(producer, build.nodes)
        graph.outputs[graph.outputs.index(new)] = codes
        new.name, codes.name = f"{name}/exact", name
        codes.shape = new.shape
        self.set_type(past, codes)
