"""What the herdgraph operators mean, in standard ONNX: the bodies that travel with every canonical graph.

With them the file runs in any ONNX runtime without herdgraph, and they are the oracle of every lowering. They are
written for clarity, not speed: ``RoutedExperts`` computes every expert on every token with the score of the ones that
were not chosen at zero, and ``CachedAttention`` reads the whole cache under a mask.

Shapes as in ``model/llama4/operators.py``.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from ...model.llama4.operators import DOMAIN, OPSET

ROUTED_EXPERTS = f"""
<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
RoutedExperts <top_k, first_expert: int = 0> (x_TD, logits_TE, gate_up_ED2F, down_EFD) => (y_TD) {{
    k = Constant <value_int: int = @top_k> ()
    one_dim = Constant <value_ints = [-1]> ()
    k_1 = Reshape (k, one_dim)
    top_Tk, experts_Tk = TopK <axis = -1, largest = 1> (logits_TE, k_1)
    sigmoid_Tk = Sigmoid (top_Tk)
    shape_TE = Shape (logits_TE)
    zeros_TE = ConstantOfShape (shape_TE)
    scores_TE = ScatterElements <axis = -1> (zeros_TE, experts_Tk, sigmoid_Tk)
    first_expert = Constant <value_int: int = @first_expert> ()
    begin = Reshape (first_expert, one_dim)
    here = Shape <start = 0, end = 1> (gate_up_ED2F)
    end = Add (begin, here)
    own_TE = Slice (scores_TE, begin, end, one_dim)
    scores_ET = Transpose <perm = [1, 0]> (own_TE)
    last = Constant <value_ints = [2]> ()
    scores_ET1 = Unsqueeze (scores_ET, last)
    first = Constant <value_ints = [0]> ()
    x_1TD = Unsqueeze (x_TD, first)
    scaled_ETD = Mul (x_1TD, scores_ET1)
    gate_up_ET2F = MatMul (scaled_ETD, gate_up_ED2F)
    gate_ETF, up_ETF = Split <axis = -1, num_outputs = 2> (gate_up_ET2F)
    sigmoid_ETF = Sigmoid (gate_ETF)
    silu_ETF = Mul (gate_ETF, sigmoid_ETF)
    hidden_ETF = Mul (silu_ETF, up_ETF)
    y_ETD = MatMul (hidden_ETF, down_EFD)
    y_TD = ReduceSum <keepdims = 0> (y_ETD, first)
}}
"""

CACHED_ATTENTION = f"""
<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
CachedAttention <num_heads, kv_heads, chunk>
    (q_BTN, k_BTM, v_BTM, past_k_BGSK, past_v_BGSK, past_lengths_B) => (y_BTN, present_k_BGSK, present_v_BGSK) {{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    third = Constant <value_ints = [2]> ()
    rest = Constant <value_ints = [-1]> ()
    chunk_size = Constant <value_int: int = @chunk> ()
    divisor = Max (chunk_size, one)
    in_chunk_B = Mod (past_lengths_B, divisor)
    is_chunked = Greater (chunk_size, zero)
    first_slot_B = Where (is_chunked, in_chunk_B, past_lengths_B)
    copy_two = Constant <value_ints = [0, 0]> ()
    heads = Constant <value_int: int = @num_heads> ()
    heads_1 = Reshape (heads, rest)
    groups = Constant <value_int: int = @kv_heads> ()
    groups_1 = Reshape (groups, rest)
    to_heads = Concat <axis = 0> (copy_two, heads_1, rest)
    to_groups = Concat <axis = 0> (copy_two, groups_1, rest)
    q_BTHK = Reshape (q_BTN, to_heads)
    k_BTGK = Reshape (k_BTM, to_groups)
    v_BTGK = Reshape (v_BTM, to_groups)
    q_BHTK = Transpose <perm = [0, 2, 1, 3]> (q_BTHK)
    k_BGTK = Transpose <perm = [0, 2, 1, 3]> (k_BTGK)
    v_BGTK = Transpose <perm = [0, 2, 1, 3]> (v_BTGK)
    present_k_BGSK = TensorScatter <axis = 2> (past_k_BGSK, k_BGTK, first_slot_B)
    present_v_BGSK = TensorScatter <axis = 2> (past_v_BGSK, v_BGTK, first_slot_B)
    tokens_1 = Shape <start = 1, end = 2> (q_BTN)
    slots_1 = Shape <start = 2, end = 3> (past_k_BGSK)
    tokens = Squeeze (tokens_1)
    slots = Squeeze (slots_1)
    token_T = Range (zero, tokens, one)
    slot_S = Range (zero, slots, one)
    first_slot_B1 = Unsqueeze (first_slot_B, second)
    own_slot_BT = Add (first_slot_B1, token_T)
    own_slot_BT1 = Unsqueeze (own_slot_BT, third)
    visible_BTS = LessOrEqual (slot_S, own_slot_BT1)
    visible_B1TS = Unsqueeze (visible_BTS, second)
    y_BHTK = Attention (q_BHTK, present_k_BGSK, present_v_BGSK, visible_B1TS)
    y_BTHK = Transpose <perm = [0, 2, 1, 3]> (y_BHTK)
    to_flat = Concat <axis = 0> (copy_two, rest)
    y_BTN = Reshape (y_BTHK, to_flat)
}}
"""

COLLECTIVES = {"AllReduce": "<width>", "AllGather": "<width, axis>", "Send": "", "Recv": ""}
"""Operators in which a rank meets others (``passes/shard/``), and their attributes.
One rank alone has the whole sum, all parts, and nothing to send: their bodies change nothing."""

_COLLECTIVE = """
<opset_import: ["" : {opset}], domain: "{domain}">
{name} {attributes} (x) => (y) {{
    y = Identity (x)
}}
"""


def is_collective(node: ir.Node) -> bool:
    """Whether ranks meet in a node."""
    return node.domain == DOMAIN and node.op_type in COLLECTIVES


def reference_functions() -> list[ir.Function]:
    """The bodies of all herdgraph operators."""
    collectives = (_COLLECTIVE.format(opset=OPSET, domain=DOMAIN, name=name, attributes=attributes)
                   for name, attributes in COLLECTIVES.items())
    texts = (ROUTED_EXPERTS, CACHED_ATTENTION, *collectives)
    return [ir.serde.deserialize_function(onnx.parser.parse_function(text)) for text in texts]


def attach_bodies(model: ir.Model) -> None:
    """Give a model the bodies of the herdgraph operators that it uses."""
    used = {(node.domain, node.op_type) for node in model.graph}
    for function in reference_functions():
        if (function.domain, function.name) in used:
            model.functions[function.identifier()] = function
            model.opset_imports[DOMAIN] = 1
