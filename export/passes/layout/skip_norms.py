"""A residual's addition and the norm that reads the sum as one operator."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ...graph.builder import CONTRIB, Builder
from ..native._matching import made_by
from ..report import report


class JoinResidualNorms(InPlacePass):
    """Turn ``RMSNormalization(Add(x, y))`` into ``SkipSimplifiedLayerNormalization``, which gives norm and sum."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        norms = [node for node in model.graph if node.op_type == "RMSNormalization"]
        found = [(norm, add) for norm in norms if (add := made_by(norm.inputs[0], "Add")) and _are_alike(add)]
        for norm, add in found:
            _join(model.graph, norm, add)
        if found:
            model.opset_imports[CONTRIB] = 1
        taken = {norm for norm, _ in found}
        return report(self, model, [norm for norm, _ in found],
                      [(norm, "it reads no sum of two activations") for norm in norms if norm not in taken])


def _are_alike(add: ir.Node) -> bool:
    """Whether two values of one shape are added, none of them a constant."""
    x, y = add.inputs
    assert x is not None and y is not None  # noqa: PT018
    return x.shape is not None and x.shape == y.shape and not x.is_initializer() and not y.is_initializer()


def _join(graph: ir.Graph, norm: ir.Node, add: ir.Node) -> None:
    build = Builder(f"{norm.name}/skip")
    normed, _, _, total = build(
        "SkipSimplifiedLayerNormalization", *add.inputs, norm.inputs[1], outputs=4, domain=CONTRIB,
        epsilon=norm.attributes["epsilon"].as_float(),
    )
    for unused in normed.producer().outputs[1:3]:
        unused.name = ""
    old = add.outputs[0]
    for new, before in ((normed, norm.outputs[0]), (total, old)):
        new.type, new.shape = before.type, before.shape
    graph.insert_before(add, build.nodes)
    norm.outputs[0].replace_all_uses_with(normed)
    old.replace_all_uses_with(total)
    graph.remove([norm, add], safe=True)
