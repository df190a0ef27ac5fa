"""The most likely token beside its logits: all that greedy decoding has to copy from a GPU."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ...graph.builder import Builder
from ..report import report

BEST = "best"
"""The output, int64 [rows]; of equal logits the first."""


class AddBestToken(InPlacePass):
    """Hand out the index of the largest logit of every row; ranks do so of the joined ones."""

    def call(self, model: ir.Model) -> PassResult:
        """Add an output behind the logits; runs after ``PackTokens``."""
        graph = model.graph
        logits = next((value for value in graph.outputs if value.name == "logits"), None)
        if logits is None:
            return report(self, model, [])
        build = Builder(BEST)
        best = build("ArgMax", logits, axis=-1, keepdims=0)
        best.name, best.type = BEST, ir.TensorType(ir.DataType.INT64)
        best.shape = ir.Shape(list(logits.shape or ())[:1])
        graph.extend(build.nodes)
        graph.outputs.append(best)
        return report(self, model, [best])
