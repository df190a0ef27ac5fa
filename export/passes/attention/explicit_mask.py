"""``CachedAttention`` for TensorRT: standard ``Attention`` over the past and the new tokens under an explicit mask.

TensorRT's ``Attention`` takes no cache, and its causal mask starts at the first key, which is wrong with a past. So
keys and values are concatenated, and one mask per kind of layer says what is visible:

    slot s of the past       of sequence b is token s of its chunk (or of its whole past) when s < L_b, garbage if not
    new token j              is token L_b + j
    query t                  is token L_b + t and sees what does not come after it

with L = ``past_lengths`` (modulo the chunk in chunked layers). Only the *new* keys and values leave the graph, as
``new.{i}.key|value`` [batch, G, tokens, K]; whoever runs it writes them into the slots from L on. Dimensions are named
``slots_local`` (chunked layers) and ``slots_global``, because all layers of a kind have buffers of one length.

Shapes: B sequences, T new tokens, S slots, X = S + T keys, N = H heads · K, M = G groups · K.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ....model.llama4.operators import DOMAIN
from ...graph.builder import Builder
from ..report import report

MASKED = -(2.0**14)
"""Added to the score of what is not visible: the exponential of its distance to any visible score is 0 in float32
(scores are tens, of unnormalised heads hundreds), score and mask together stay finite in float16 (65504), and a power
of two is exact in every type. Not minus infinity: fused kernels subtract it from itself."""
_NEVER = np.iinfo(np.int32).max
"""Position of a slot that holds nothing: after every query."""


class LowerExplicitAttention(InPlacePass):
    """Turn ``CachedAttention`` into ``Attention`` and the presents into the new tokens' keys and values."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every ``CachedAttention`` of the main graph, and the graph's cache outputs."""
        targets = [node for node in model.graph if node.domain == DOMAIN and node.op_type == "CachedAttention"]
        masks: dict[int, ir.Value] = {}
        for node in targets:
            _lower(node, masks)
        return report(self, model, targets)


def _lower(node: ir.Node, masks: dict[int, ir.Value]) -> None:
    """Replace a node; the first of a kind makes the mask of all others."""
    graph, build = node.graph, Builder(str(node.name))
    assert isinstance(graph, ir.Graph)
    past_k, past_v = node.inputs[3:5]
    assert past_k is not None
    assert past_v is not None
    heads, groups, chunk = (node.attributes[name].as_int() for name in ("num_heads", "kv_heads", "chunk"))
    q_BHTK, new_k, new_v = (
        _by_head(build, x, count) for x, count in zip(node.inputs[:3], (heads, groups, groups), strict=True)
    )
    k_BGXK, v_BGXK = (build("Concat", *pair, axis=2) for pair in ((past_k, new_k), (past_v, new_v)))
    graph.insert_before(node, build.nodes)
    if chunk not in masks:
        masks[chunk] = _mask(node, k_BGXK, chunk)
    build = Builder(f"{node.name}/attention")
    y_BHTK = build("Attention", q_BHTK, k_BGXK, v_BGXK, masks[chunk])
    y_BTN = build("Reshape", build("Transpose", y_BHTK, perm=[0, 2, 1, 3]), build.constant([0, 0, -1]))
    for past, present, new in zip((past_k, past_v), node.outputs[1:], (new_k, new_v), strict=True):
        _hand_out(graph, past, present, new, "slots_local" if chunk else "slots_global")
    ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, node.outputs[:1], [y_BTN])


def _mask(node: ir.Node, k_BGXK: ir.Value, chunk: int) -> ir.Value:
    """What is added to the scores [B, 1, T, X] of all layers of one kind.

    The slots are counted in the joined keys, not in the cache: TensorRT lets a cache of FP8 codes be dequantised only.
    """
    build = Builder(f"mask.{f'chunk_{chunk}' if chunk else 'global'}")
    queries, lengths_B = node.inputs[0], node.inputs[5]
    held_B1 = build("Unsqueeze", build("Mod", lengths_B, build.constant(chunk)) if chunk else lengths_B,
                    build.constant([1]))
    keys, tokens = (build("Squeeze", build("Shape", value, start=axis, end=axis + 1))
                    for value, axis in ((k_BGXK, 2), (queries, 1)))
    slot_S, token_T = (build("Range", build.constant(0), count, build.constant(1))
                       for count in (build("Sub", keys, tokens), tokens))
    slot_BS = build("Where", build("Less", slot_S, held_B1), slot_S, build.constant(_NEVER))
    token_BT = build("Add", held_B1, token_T)
    key_B11X = build("Unsqueeze", build("Concat", slot_BS, token_BT, axis=1), build.constant([1, 2]))
    query_B1T1 = build("Unsqueeze", token_BT, build.constant([1, 3]))
    zero, masked = (build("Constant", value=ir.Tensor(np.float32(value))) for value in (0.0, MASKED))
    mask_B1TX: ir.Value = build("Where", build("LessOrEqual", key_B11X, query_B1T1), zero, masked)
    assert node.graph is not None
    node.graph.insert_before(node, build.nodes)
    return mask_B1TX


def _by_head(build: Builder, x_BTN: ir.Value | None, heads: int) -> ir.Value:
    """[B, T, heads · K] to [B, heads, T, K]."""
    x_BTHK = build("Reshape", x_BTN, build.constant([0, 0, heads, -1]))
    x_BHTK: ir.Value = build("Transpose", x_BTHK, perm=[0, 2, 1, 3])
    return x_BHTK


def _hand_out(graph: ir.Graph, past: ir.Value, present: ir.Value, new: ir.Value, slots: str) -> None:
    """Put the new keys or values in the place of the whole cache among the graph's outputs."""
    assert past.shape is not None
    batch, groups, _, width = past.shape
    past.shape = ir.Shape((batch, groups, slots, width))
    new.name = str(past.name).replace("past.", "new.", 1)
    new.shape, new.type = ir.Shape((batch, groups, "tokens", width)), past.type
    graph.outputs[graph.outputs.index(present)] = new
