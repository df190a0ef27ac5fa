"""Keys and values stored in E4M3, for graphs that read the past and hand out the new (``lower_explicit_attention.py``).

    past.{i}.key (E4M3) -> DQ(s) ----------------\
                                                  Concat -> Attention
    new key -> Q(s) -> new.{i}.key (E4M3) -> DQ(s) /

Attention sees its new tokens as it will see them again later, through the cache. Its arithmetic stays in floating
point: TensorRT has no fused FP8 attention for this, and Q/DQ around it would round twice for nothing.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ....model.quantization.calibration_file import CalibrationFile
from ....model.quantization.e4m3 import input_scale
from ...graph.builder import Builder


class QuantizeCachesFp8(InPlacePass):
    """Give caches the type E4M3, with one scale for keys and one for values per layer.

    Args:
        calibration: the largest magnitudes of keys and values.
    """

    def __init__(self, calibration: CalibrationFile) -> None:
        super().__init__()
        self.calibration = calibration

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the cache inputs and outputs of the main graph."""
        graph = model.graph
        pasts = [value for value in graph.inputs if str(value.name).startswith("past.")]
        outputs = {str(value.name): value for value in graph.outputs}
        for past in pasts:
            _, layer, part = str(past.name).split(".")
            scale = input_scale(self.calibration.required_kv_amax(int(layer))[part == "value"])
            _quantize(graph, past, outputs[f"new.{layer}.{part}"], scale)
        return PassResult(model, modified=bool(pasts))


def _quantize(graph: ir.Graph, past: ir.Value, new: ir.Value, scale: float) -> None:
    (reader, place), = past.uses()
    producer, name = new.producer(), str(new.name)
    assert producer is not None
    build = Builder(f"{past.name}/fp8")
    zero = build("Constant", value=ir.Tensor(np.zeros((), ir.DataType.FLOAT8E4M3FN.numpy()),
                                             dtype=ir.DataType.FLOAT8E4M3FN))
    s = build("Constant", value=ir.Tensor(np.asarray(scale, np.float32)))
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
    for value in (past, codes):
        value.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
