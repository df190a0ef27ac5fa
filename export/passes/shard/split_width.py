"""One rank's part of a canonical decoder, inside of a stage: its heads, its share of F, its experts, its vocabulary.

    attention, feed-forward     weights are slices, results partial sums:  y = AllReduce(y of this rank)
    embedding                   rows [v0, v1) of the table; other ids look up zeros:  x = AllReduce(x of this rank)
    head                        logits of rows [v0, v1):  logits = AllGather(logits of this rank)

Shared and routed experts are added before their sum is shared: one ``AllReduce`` per attention, one per feed-forward.
The router sees all tokens on every rank, so that each knows who computes what without asking.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ....model.config import HerdConfig
from ....model.config.shard_plan import ShardPlan, shapes_of_rank
from ....model.llama4.operators import DOMAIN
from ...graph.builder import Builder
from ...graph.functions import attach_bodies
from ..report import report

_PARTIAL = re.compile(r"layers\.\d+\.(self_attn\.o_proj|feed_forward(\.down_proj|/Add))")
"""Nodes whose result is a rank's part of a sum: the last of attention, of a dense and of a mixture feed-forward."""
_INNER = re.compile(
    r"layers\.\d+\.(self_attn(?!\.o_proj)|feed_forward(\.shared_expert)?(/(Sigmoid|Mul)|\.(gate|up)_proj))"
)
"""Nodes whose results have a size of a rank's own."""


class SplitWidth(InPlacePass):
    """Make a stage's decoder that of one rank; runs before weights are bound.

    Args:
        plan: how the model is split.
        rank: whose part is kept.
        config: the whole model.
    """

    def __init__(self, plan: ShardPlan, rank: int, config: HerdConfig) -> None:
        super().__init__()
        self.plan, self.rank, self.config = plan, rank, config

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        if self.plan.width == 1:
            return report(self, model, [])
        graph, shapes = model.graph, shapes_of_rank(self.plan, self.config, self.rank)
        for name, value in graph.initializers.items():
            if name in shapes:
                value.shape = ir.Shape(shapes[name])
        for node in list(graph):
            self._split(graph, node)
        for value in (*graph.inputs, *graph.outputs):
            if str(value.name).startswith(("past.", "present.")):
                value.shape = self._cache_shape(value)
        attach_bodies(model)
        return report(self, model, list(graph))

    def _split(self, graph: ir.Graph, node: ir.Node) -> None:
        name, text = str(node.name), self.config.text
        if _INNER.match(name):
            _forget_sizes(node)
        if node.op_type == "RotaryEmbedding":
            heads = node.attributes["num_heads"].as_int()
            _set(node, num_heads=max(1, heads // self.plan.width))
        elif node.op_type == "CachedAttention":
            local = self.plan.local_text(text, self.rank)
            _set(node, num_heads=local.num_heads, kv_heads=local.num_kv_heads)
        elif node.op_type == "Reshape" and ".qk_norm" in name and (shape := node.outputs[0].shape):
            _reshape_heads(graph, node, [0, 0, -1, text.head_dim] if len(shape) == 4 else [0, 0, -1])
        elif node.op_type == "RoutedExperts" and self.plan.expert > 1:
            _set(node, first_expert=self.plan.experts_of(self.rank, text.num_experts).start)
        elif _PARTIAL.fullmatch(name):
            self._share(graph, node.outputs[0], "AllReduce")
        elif self.plan.splits_vocabulary(text):
            self._split_vocabulary(graph, node)

    def _split_vocabulary(self, graph: ir.Graph, node: ir.Node) -> None:
        if node.name == "embed_tokens":
            self._share(graph, _look_up(graph, node, self._rows()), "AllReduce")
        elif node.outputs[0].name == "logits":
            part = node.outputs[0]
            self._share(graph, part, "AllGather", axis=-1)
            part.shape = ir.Shape([*(part.shape or ())[:-1], self.config.text.vocab_size // self.plan.width])

    def _share(self, graph: ir.Graph, part: ir.Value, operator: str, **attributes: int) -> None:
        """Put a collective behind a value; it takes over the value's name and users."""
        name, node = str(part.name), part.producer()
        assert node is not None
        build = Builder(name)
        shared: ir.Value = build(operator, part, domain=DOMAIN, width=self.plan.width, **attributes)
        shared.shape, shared.type = part.shape, part.type
        users = [(user, index) for user, index in part.uses() if user is not shared.producer()]
        for user, index in users:
            user.replace_input_with(index, shared)
        graph.insert_after(node, build.nodes)
        part.name, shared.name = f"{name}/part", name
        for index, value in enumerate(graph.outputs):
            if value is part:
                graph.outputs[index] = shared

    def _rows(self) -> range:
        parts = self.plan.parts(self.config, "embed_tokens.weight", self.rank)
        assert parts, "the first stage holds a slice of the embedding"
        return parts[0][0]

    def _cache_shape(self, value: ir.Value) -> ir.Shape:
        assert value.shape is not None
        batch, _, slots, width = value.shape
        return ir.Shape((batch, self.plan.local_text(self.config.text, self.rank).num_kv_heads, slots, width))


def _set(node: ir.Node, **numbers: int) -> None:
    for name, number in numbers.items():
        node.attributes[name] = ir.AttrInt64(name, number)


def _forget_sizes(node: ir.Node) -> None:
    """Keep only the rank of shapes that were the whole model's."""
    for value in node.outputs:
        if value.shape is not None and not value.is_graph_output():
            value.shape = ir.Shape([None] * len(value.shape))


def _reshape_heads(graph: ir.Graph, node: ir.Node, shape: list[int]) -> None:
    """Let [B, T, N] become [B, T, heads, K], or the reverse, whatever the number of heads is."""
    build = Builder(str(node.name))
    node.replace_input_with(1, build.constant(shape))
    _set(node, allowzero=0)
    graph.insert_before(node, build.nodes)


def _look_up(graph: ir.Graph, gather: ir.Node, rows: range) -> ir.Value:
    """Let a lookup of whole ids be one in a slice of the table: ids of other ranks' rows give zeros."""
    build = Builder(f"{gather.name}/own")
    table, ids = gather.inputs
    row = build("Sub", ids, build.constant(rows.start))
    within = build("GreaterOrEqual", row, build.constant(0)), build("Less", row, build.constant(len(rows)))
    is_own = build("And", *within)
    found = build("Gather", table, build("Where", is_own, row, build.constant(0)), axis=0)
    zero = build("Constant", value=ir.Tensor(np.float32(0)))
    own: ir.Value = build("Where", build("Unsqueeze", is_own, build.constant([-1])), found, zero)
    ir.convenience.replace_nodes_and_values(graph, gather, [gather], build.nodes, gather.outputs, [own])
    return own
