"""What ``com.microsoft.PagedAttention`` means, in standard operators: it has no kernel for a CPU.

As ContribOperators.md of ONNX Runtime describes it: heads are normed, then rotated by their position; keys and values
are stored in the slots that the block table says, and read from there, as codes where caches have fewer bits.

Shapes: T tokens, B sequences, S slots of a table's row, H query heads, G key and value heads, R = H / G, K width.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from herdgraph.export.graph.builder import Builder


def expand(model: ir.Model) -> ir.Model:
    """Replace the operator everywhere; returns the model."""
    for node in [node for node in model.graph if node.op_type == "PagedAttention" and node.domain == "com.microsoft"]:
        build = Builder(f"{node.name}/expanded")
        outputs, given = _Expansion(node, build).outputs(), node.inputs[3:5]
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], build.nodes, node.outputs, outputs)
        for present, past in zip(outputs[1:], given, strict=True):
            present.dtype = past.dtype
    return model


class _Expansion:
    def __init__(self, node: ir.Node, build: Builder) -> None:
        self.build, self.node = build, node
        self.inputs = [*node.inputs, *[None] * (17 - len(node.inputs))]
        self.told = {name: attribute.value for name, attribute in node.attributes.items()}
        self.heads, self.groups = self.told["num_heads"], self.told["kv_num_heads"]
        self.pool = self.inputs[3]
        self.dims = int(self.pool.shape[3])
        self.block = self("Shape", self.pool, start=1, end=2)

    def __call__(self, op_type, *inputs, **attributes):
        given = [self.build.constant(each) if isinstance(each, int | list) else each for each in inputs]
        return self.build(op_type, *given, **attributes)

    def outputs(self) -> list[ir.Value]:
        q, k, v = self._parts()
        sequence_T, position_T = self._places()
        q, k = self._prepared(q, self.heads, 12, position_T), self._prepared(k, self.groups, 13, position_T)
        v = self("Reshape", v, [-1, self.groups, self.dims])
        slot_T1 = self._slots(sequence_T, position_T)
        keys, presents_k = self._stored(k, 3, 14, slot_T1)
        values, presents_v = self._stored(v, 4, 15, slot_T1)
        y = self._attended(q, keys, values, sequence_T, position_T)
        return [y, presents_k, presents_v]

    def _parts(self):
        if self.inputs[1] is not None:
            return self.inputs[:3]
        widths = [count * self.dims for count in (self.heads, self.groups, self.groups)]
        return self("Split", self.inputs[0], widths, outputs=3, axis=-1)

    def _places(self):
        """The sequence of every token, and its position there."""
        cumulative, past = (self("Cast", self.inputs[at], to=ir.DataType.INT64) for at in (5, 6))
        first_B = self("Slice", cumulative, [0], [-1], [0])
        rows = self("Squeeze", self("Shape", self.inputs[0], start=0, end=1))
        token_T = self("Range", 0, rows, 1)
        ends = self("Unsqueeze", self("Slice", cumulative, [1], [1 << 40], [0]), [1])
        behind_BT = self("Cast", self("LessOrEqual", ends, token_T), to=ir.DataType.INT64)
        sequence_T = self("ReduceSum", behind_BT, [0], keepdims=0)
        own_T = self("Sub", token_T, self("Gather", first_B, sequence_T))
        return sequence_T, self("Add", self("Gather", past, sequence_T), own_T)

    def _prepared(self, x, heads, gain, position_T):
        if self.inputs[gain] is not None:
            by_head = self("Reshape", x, [-1, heads, self.dims])
            x = self("RMSNormalization", by_head, self.inputs[gain], axis=-1, epsilon=self.told["qk_norm_epsilon"])
            x = self("Reshape", x, [-1, heads * self.dims])
        if self.told.get("do_rotary"):
            tables = [self("Unsqueeze", self("Gather", self.inputs[at], position_T), [0]) for at in (8, 9)]
            x = self("RotaryEmbedding", self("Unsqueeze", x, [0]), *tables, num_heads=heads,
                     interleaved=self.told["rotary_interleaved"])
        return self("Reshape", x, [-1, heads, self.dims])

    def _slots(self, sequence_T, position_T):
        place_T2 = self("Concat", *(self("Unsqueeze", each, [1]) for each in (
            sequence_T, self("Div", position_T, self.block))), axis=1)
        block_T = self("Cast", self("GatherND", self.inputs[7], place_T2), to=ir.DataType.INT64)
        slot_T = self("Add", self("Mul", block_T, self.block), self("Mod", position_T, self.block))
        return self("Unsqueeze", slot_T, [1])

    def _stored(self, new, cache, scale, slot_T1):
        """Keys or values of all slots as they are read, and the cache."""
        before, step = self.inputs[cache], self.inputs[scale]
        dtype = before.dtype
        if dtype == ir.DataType.FLOAT8E4M3FN:  # numpy's arrays of it are not taken: codes lie there as float32
            before.dtype = ir.DataType.FLOAT
        if step is not None:
            step = self("Squeeze", step)
            new = self("Cast", self("QuantizeLinear", new, step, output_dtype=dtype), to=ir.DataType.FLOAT)
        flat = self("Reshape", self("Cast", before, to=ir.DataType.FLOAT), [-1, self.groups, self.dims])
        flat = self("ScatterND", flat, slot_T1, new)
        after = self("Cast", self("Reshape", flat, self("Shape", before)), to=before.dtype)
        after.shape = before.shape
        return flat if step is None else self("Mul", flat, step), after

    def _attended(self, q, keys, values, sequence_T, position_T):
        table_BW = self("Max", self("Cast", self.inputs[7], to=ir.DataType.INT64), 0)
        inside = self("Range", 0, self("Squeeze", self.block), 1)
        slots_BWb = self("Add", self("Unsqueeze", self("Mul", table_BW, self.block), [2]), inside)
        slots_TS = self("Gather", self("Reshape", slots_BWb, [0, -1]), sequence_T)
        keys, values = self("Gather", keys, slots_TS), self("Gather", values, slots_TS)  # [T, S, G, K]
        q = self("Reshape", q, [-1, self.groups, self.heads // self.groups, self.dims])
        scores = self("Einsum", q, keys, equation="tgrk,tsgk->tgrs")
        scale = self("Constant", value=ir.Tensor(np.float32(self.dims**-0.5)))
        slot_S = self("Range", 0, self("Squeeze", self("Shape", slots_TS, start=1, end=2)), 1)
        visible_TS = self("LessOrEqual", slot_S, self("Unsqueeze", position_T, [1]))
        masked = self("Constant", value=ir.Tensor(np.float32(-1e30)))
        scores = self("Where", self("Unsqueeze", visible_TS, [1, 2]), self("Mul", scores, scale), masked)
        y = self("Einsum", self("Softmax", scores, axis=-1), values, equation="tgrs,tsgk->tgrk")
        return self("Reshape", y, [-1, self.heads * self.dims])
