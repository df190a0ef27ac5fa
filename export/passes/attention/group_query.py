"""``CachedAttention`` for ONNX Runtime: one fused operator that appends to the cache in place."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ....model.llama4.operators import DOMAIN
from ...graph.builder import CONTRIB, Builder
from ..report import report


class LowerCachedAttention(InPlacePass):
    """Turn ``CachedAttention`` into ``com.microsoft.GroupQueryAttention``.

    A chunked layer needs neither a mask nor a rolling window: its buffer has ``chunk`` slots, the new tokens begin at
    ``length % chunk``, and the operator is told that the cache ends there. (Its ``local_window_size`` would mask, but
    still read, the whole buffer.) Rotation and norms happened before, so the operator's own are off. With past and
    present bound to one buffer nothing is copied.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every ``CachedAttention`` of the main graph."""
        targets = [node for node in model.graph if node.domain == DOMAIN and node.op_type == "CachedAttention"]
        lengths: dict[int, tuple[ir.Value, ir.Value]] = {}
        for node in targets:
            chunk = node.attributes["chunk"].as_int()
            if chunk not in lengths:
                lengths[chunk] = self._lengths(node, chunk)
            self._lower(node, *lengths[chunk])
        if targets:
            model.opset_imports[CONTRIB] = 1
        return report(self, model, targets)

    def _lengths(self, node: ir.Node, chunk: int) -> tuple[ir.Value, ir.Value]:
        """Last valid slot per sequence, and the longest cache, both after the append: what all layers share."""
        build = Builder(f"cache.{f'chunk_{chunk}' if chunk else 'global'}")
        queries, past_lengths = node.inputs[0], node.inputs[5]
        first_B = build("Mod", past_lengths, build.constant(chunk)) if chunk else past_lengths
        tokens_1 = build("Shape", queries, start=1, end=2)
        total_B = build("Add", first_B, tokens_1)
        last_B = build("Sub", total_B, build.constant([1]))
        longest = build("ReduceMax", total_B, keepdims=0)
        last_B, longest = (build("Cast", value, to=ir.DataType.INT32) for value in (last_B, longest))
        for value, dims in ((last_B, ["batch"]), (longest, [])):  # known where a cut runs between them and a layer
            value.type, value.shape = ir.TensorType(ir.DataType.INT32), ir.Shape(dims)
        assert node.graph is not None
        node.graph.insert_before(node, build.nodes)
        return last_B, longest

    def _lower(self, node: ir.Node, last_B: ir.Value, longest: ir.Value) -> None:
        heads, groups = node.attributes["num_heads"].as_int(), node.attributes["kv_heads"].as_int()
        build = Builder(str(node.name))
        outputs = build(
            "GroupQueryAttention", *node.inputs[:5], last_B, longest, outputs=3, domain=CONTRIB,
            num_heads=heads, kv_num_heads=groups, do_rotary=0,
        )
        assert node.graph is not None
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], build.nodes, node.outputs, outputs)

