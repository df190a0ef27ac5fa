"""``AllReduce`` and ``AllGather`` as TensorRT's ``DistCollective``: the sums are inside of each rank's plan.

TensorRT puts gathered parts side by side along the first axis, whatever the data is:

    x [B, R, V/w]  ->  [1, B, R, V/w]  ->  DistCollective  ->  [w, B, R, V/w]  ->  [B, R, w, V/w]  ->  [B, R, V]

Ranks are counted inside of their stage; whoever runs a plan gives it a communicator of the stage. Not run on hardware.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ....model.llama4.operators import DOMAIN
from ...graph.builder import Builder
from ..experts.fused import TENSORRT
from ..report import report

DIST_COLLECTIVE = "DistCollective"


class LowerCollectives(InPlacePass):
    """Replace every ``AllReduce`` and ``AllGather``; what enters and leaves a stage is left to whoever runs it."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        lowered = {"AllReduce": _all_reduce, "AllGather": _all_gather}
        found = [node for node in model.graph if node.domain == DOMAIN and node.op_type in lowered]
        for node in found:
            build = Builder(str(node.name))
            y = lowered[node.op_type](build, node)
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], build.nodes, node.outputs, [y])
        if found:
            model.opset_imports[TENSORRT] = 1
        return report(self, model, found)


def _all_reduce(build: Builder, node: ir.Node) -> ir.Value:
    return _collective(build, node, node.inputs[0], "all_reduce", "sum")


def _all_gather(build: Builder, node: ir.Node) -> ir.Value:
    shape = node.outputs[0].shape
    assert shape is not None
    assert node.attributes["axis"].as_int() in (-1, len(shape) - 1), "parts are put side by side along the last axis"
    parts = _collective(build, node, build("Unsqueeze", node.inputs[0], build.constant([0])), "all_gather", "none")
    beside = build("Transpose", parts, perm=[*range(1, len(shape)), 0, len(shape)])
    whole: ir.Value = build("Reshape", beside, build.constant([*[0] * (len(shape) - 1), -1]))
    return whole


def _collective(build: Builder, node: ir.Node, x: ir.Value | None, operation: str, reduction: str) -> ir.Value:
    width = node.attributes["width"].as_int()
    y: ir.Value = build(
        DIST_COLLECTIVE, x, domain=TENSORRT, collective_operation=operation, reduce_op=reduction, root=-1,
        group_size=width, groups=list(range(width)), nb_rank=width,
    )
    return y
