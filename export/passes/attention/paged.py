"""``CachedAttention`` as our own ``PagedAttention``: rotation, norm, temperature, append and attention in one operator.

A layer's keys and values live in cache blocks of 64 tokens, ``past.{i}.key|value`` uint8 [blocks, bytes], which any
sequence may use through its block table. In 8 bits every token has a scale of its own, so nothing is calibrated.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from ....model.llama4.operators import DOMAIN as HERDGRAPH
from ....model.quantization.recipes import Caches
from ....runtimes.kv_cache.pool import block_bytes
from ...graph.builder import Builder
from ..native._matching import made_by
from ..native._weights import DOMAIN
from ..report import report
from .pack_tokens import CHUNKED_TABLE, GLOBAL_TABLE

CACHE_TYPES: tuple[Caches, ...] = ("float", "float16", "int8")
"""How keys and values are stored, in the order of the numbers that the operator has for it."""


class LowerPagedAttention(InPlacePass):
    """Turn ``CachedAttention`` and what prepares its inputs into ``PagedAttention``; runs after ``PackTokens``.

    Args:
        caches: how keys and values are stored.
    """

    def __init__(self, caches: Caches) -> None:
        super().__init__()
        self.caches = caches

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every ``CachedAttention`` of the main graph, and its cache inputs and outputs."""
        graph = model.graph
        found = [node for node in graph if node.domain == HERDGRAPH and node.op_type == "CachedAttention"]
        given = {str(value.name): value for value in graph.inputs}
        for node in found:
            self._lower(graph, node, given)
        if found:
            model.opset_imports[DOMAIN] = 1
            common.RemoveUnusedNodesPass()(model)
        return report(self, model, found)

    def _lower(self, graph: ir.Graph, node: ir.Node, given: dict[str, ir.Value]) -> None:
        build = Builder(str(node.name))
        prepared = _Prologue(node, build)
        heads, groups, chunk = (node.attributes[name].as_int() for name in ("num_heads", "kv_heads", "chunk"))
        past_k, past_v = node.inputs[3:5]
        assert past_k is not None and past_v is not None and past_k.shape is not None  # noqa: PT018
        head_dim = past_k.shape[3]
        assert isinstance(head_dim, int), "the width of a head is known"
        size = block_bytes(groups, head_dim, self.caches)
        for value in (past_k, past_v, *node.outputs[1:]):
            value.type, value.shape = ir.TensorType(ir.DataType.UINT8), ir.Shape([_pool(chunk), size])
        table = given[CHUNKED_TABLE if chunk else GLOBAL_TABLE]
        outputs = build(
            "PagedAttention", *prepared.qkv, past_k, past_v, given["cumulative_lengths"], given["past_lengths"], table,
            *prepared.rotation, prepared.temperature, outputs=3, domain=DOMAIN, num_heads=heads, kv_num_heads=groups,
            chunk=chunk, cache_type=CACHE_TYPES.index(self.caches), norm_epsilon=prepared.epsilon,
        )
        y, dtype = outputs[0], node.outputs[0].type
        # The operator works on lists of tokens.
        y_row = build("Unsqueeze", y, build.constant([0]))
        y.type, y.shape = dtype, ir.Shape(["tokens", heads * head_dim])
        y_row.type, y_row.shape = dtype, ir.Shape([1, "tokens", heads * head_dim])
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, node.outputs, [y_row, *outputs[1:]])


class _Prologue:
    """What happens to queries and keys between their product and attention, walked backwards.

    Attributes:
        qkv: queries, keys and values side by side, and two absent inputs; or the three.
        rotation: cosines and sines, absent in layers without rotation.
        temperature: a factor per token, absent in layers without.
        epsilon: of the norm over each head, 0 without.
    """

    def __init__(self, node: ir.Node, build: Builder) -> None:
        self.build, self.epsilon = build, 0.0
        self.rotation: list[ir.Value | None] = [None, None]
        self.temperature: ir.Value | None = None
        q, k, v = node.inputs[:3]
        q, k = self._before_norm(self._before_temperature(q)), self._before_norm(k)
        q, k = self._before_rotation(q), self._before_rotation(k)
        split = made_by(q, "Split")
        if split is not None and tuple(split.outputs) == (q, k, v):
            self.qkv: list[ir.Value | None] = [self._list(split.inputs[0]), None, None]
        else:
            self.qkv = [self._list(q), self._list(k), self._list(v)]

    def _list(self, value: ir.Value | None) -> ir.Value:
        """[1, tokens, N] as [tokens, N]."""
        assert value is not None
        rows: ir.Value = self.build("Squeeze", value, self.build.constant([0]))
        rows.type, rows.shape = value.type, ir.Shape(list(value.shape)[1:]) if value.shape is not None else None
        return rows

    def _before_temperature(self, q: ir.Value | None) -> ir.Value | None:
        product = made_by(q, "Mul")
        if product is None:
            return q
        factor = product.inputs[1]
        assert factor is not None
        self.temperature = self.build("Reshape", factor, self.build.constant([-1]))
        self.temperature.type, self.temperature.shape = factor.type, ir.Shape(["tokens"])
        return product.inputs[0]

    def _before_norm(self, x: ir.Value | None) -> ir.Value | None:
        flat = made_by(x, "Reshape")
        norm = made_by(flat.inputs[0], "RMSNormalization") if flat else None
        by_head = made_by(norm.inputs[0], "Reshape") if norm else None
        if norm is None or by_head is None:
            return x
        gain = norm.inputs[1]
        assert gain is not None and gain.const_value is not None and np.all(gain.const_value.numpy() == 1)  # noqa: PT018
        self.epsilon = norm.attributes["epsilon"].as_float()
        return by_head.inputs[0]

    def _before_rotation(self, x: ir.Value | None) -> ir.Value | None:
        rotation = made_by(x, "RotaryEmbedding")
        if rotation is None:
            return x
        if self.rotation[0] is None:
            self.rotation = [self._list(table) for table in rotation.inputs[1:3]]
        return rotation.inputs[0]


def _pool(chunk: int) -> str:
    return "chunked_pool" if chunk else "global_pool"


