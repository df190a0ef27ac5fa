"""Readable names: nodes and values of a captured graph are called after the torch module they come from."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"
_PRINCIPAL = {"MatMul", "Gemm", "Gather", "RMSNormalization", "LayerNormalization", "RoutedExperts", "CachedAttention"}


def name_after_modules(model: ir.Model) -> None:
    """Rename nodes to ``layers.3.feed_forward.experts`` (a module's own operator) or ``<module>/<Operator>``.

    Outputs take the node's name, so that a value seen in netron or in a log tells where it was computed. Bookkeeping
    of the exporter (stack traces, class names) is removed.
    """
    taken: Counter[str] = Counter()
    for node in model.graph:
        module = _module_of(node)
        principal = node.op_type in _PRINCIPAL and module and not taken[module]
        name = module if principal else f"{module}/{node.op_type}".lstrip("/")
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        for index, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = node.name if index == 0 else f"{node.name}:{index}"
            output.metadata_props.clear()
        node.metadata_props.clear()
        node.doc_string = None
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _module_of(node: ir.Node) -> str:
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    module = str(scopes[-2]) if len(scopes) > 1 else ""
    return "" if module.startswith("_empty_nn_module_stack") else module
