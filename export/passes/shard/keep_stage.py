"""One pipeline stage of a canonical decoder: its layers, what the stage before sends, what the next one receives.

    hidden.{first}  ->  Recv  ->  layers first .. end - 1  ->  Send  ->  hidden.{end}          [batch, tokens, width]

The first stage has the embedding and the image features, the last one norm and head. Every stage computes positions
from the lengths by itself. Caches are counted from 0 in each stage; nodes and weights keep the model's names.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from ....model.config.shard_plan import ShardPlan
from ....model.llama4.operators import DOMAIN
from ...graph.builder import Builder
from ...graph.functions import attach_bodies
from ..report import report


class KeepStage(InPlacePass):
    """Leave only the layers of a rank's stage; runs before weights are bound.

    Args:
        plan: how the model is split.
        rank: whose stage is kept.
        num_layers: of the whole model.
    """

    def __init__(self, plan: ShardPlan, rank: int, num_layers: int) -> None:
        super().__init__()
        self.layers = plan.layers_of(plan.stage_of(rank), num_layers)
        self.num_layers = num_layers

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        graph, layers = model.graph, self.layers
        if len(layers) == self.num_layers:
            return report(self, model, [])
        entering = {node.name: node.inputs[0] for node in graph if str(node.name).endswith(".input_layernorm")}
        outputs = [value for value in graph.outputs if self._keeps(value, last="logits")]
        if layers.stop < self.num_layers:
            outputs.insert(0, _send(graph, entering[f"layers.{layers.stop}.input_layernorm"], layers.stop))
        if layers.start:
            _receive(graph, entering[f"layers.{layers.start}.input_layernorm"], layers.start)
        graph.outputs[:] = outputs
        common.RemoveUnusedNodesPass()(model)
        graph.inputs[:] = [value for value in graph.inputs if value.uses() and self._keeps(value)]
        for value in (*graph.inputs, *graph.outputs):
            self._renumber(value)
        attach_bodies(model)
        return report(self, model, (*graph.inputs, *graph.outputs))

    def _keeps(self, value: ir.Value, last: str = "") -> bool:
        """Whether an input or output belongs to the stage; ``last`` is one of the last stage's."""
        name, *parts = str(value.name).split(".")
        if name in ("past", "present"):
            return int(parts[0]) in self.layers
        return name != last or self.layers.stop == self.num_layers

    def _renumber(self, value: ir.Value) -> None:
        name, *parts = str(value.name).split(".")
        if name in ("past", "present"):
            layer = int(parts[0]) - self.layers.start
            value.name = f"{name}.{layer}.{parts[1]}"
            assert value.shape is not None
            batch, heads, _, width = value.shape
            value.shape = ir.Shape((batch, heads, f"slots_{layer}", width))


def _receive(graph: ir.Graph, hidden: ir.Value | None, layer: int) -> None:
    """Let a graph input take the place of what enters a layer."""
    assert hidden is not None
    given = ir.Value(name=f"hidden.{layer}", shape=hidden.shape, type=hidden.type)
    build = Builder(f"layers.{layer}/receive")
    received: ir.Value = build("Recv", given, domain=DOMAIN)
    received.shape, received.type = hidden.shape, hidden.type
    hidden.replace_all_uses_with(received)
    graph.inputs.append(given)
    graph.insert_before(graph[0], build.nodes)


def _send(graph: ir.Graph, hidden: ir.Value | None, layer: int) -> ir.Value:
    """Hand out what enters a layer of the next stage."""
    assert hidden is not None
    build = Builder(f"layers.{layer}/send")
    sent: ir.Value = build("Send", hidden, domain=DOMAIN)
    sent.name, sent.shape, sent.type = f"hidden.{layer}", hidden.shape, hidden.type
    graph.extend(build.nodes)
    return sent
