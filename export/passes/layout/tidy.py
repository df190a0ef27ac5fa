"""What every pipeline ends with: equal subexpressions are shared, and what nothing uses is removed."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from ..report import report

_STEPS = (common.CommonSubexpressionEliminationPass, common.RemoveUnusedNodesPass, common.RemoveUnusedFunctionsPass,
          common.RemoveUnusedOpsetsPass)


class Tidy(InPlacePass):
    """Share equal subexpressions, and remove nodes, functions and opsets that nothing uses."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the whole model."""
        before = list(model.graph)
        for step in _STEPS:
            step()(model)
        left = set(model.graph)
        return report(self, model, [node for node in before if node not in left])
