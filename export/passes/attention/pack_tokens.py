"""The interface of a paged, ragged runner: tokens of several sequences in one list.

========================  ==============================  ===================================================
decoder input             shape                           meaning
========================  ==============================  ===================================================
``input_ids``             int64 [tokens]                  ids of all sequences, one after the other
``positions``             int64 [tokens]                  position of each token in its sequence
``cumulative_lengths``    int32 [sequences + 1]           tokens b of the list begin at c[b] and end at c[b + 1]
``past_lengths``          int32 [sequences]               tokens that each sequence already holds
``block_table.global``    int32 [sequences, blocks]       cache blocks of layers that see their whole past
``block_table.chunked``   int32 [sequences, blocks]       those of the current chunk, for chunked layers
``logit_rows``            int64 [rows]                    places in the list whose logits are wanted
========================  ==============================  ===================================================

``logits`` is float [rows, vocabulary]. Inside, the list is a batch of one row. Attention still is that of one sequence
without a past, until ``LowerPagedAttention`` reads lengths and tables.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ...graph.builder import Builder
from ..report import report

GLOBAL_TABLE, CHUNKED_TABLE = "block_table.global", "block_table.chunked"
_LENGTHS = {"cumulative_lengths": ["sequences_plus_1"], "past_lengths": ["sequences"]}
_TABLES = {GLOBAL_TABLE: ["sequences", "global_blocks"], CHUNKED_TABLE: ["sequences", "chunked_blocks"]}


class PackTokens(InPlacePass):
    """Turn a decoder over a batch of sequences into one over a list of tokens."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite inputs, positions and outputs of the main graph."""
        graph = model.graph
        given = {str(value.name): value for value in graph.inputs}
        if "past_lengths" not in given:  # an image tower
            return report(self, model, [])
        build = Builder("packed")
        chunked = {node.attributes["chunk"].as_int() > 0 for node in graph if node.op_type == "CachedAttention"}
        tables = [name for name, kind in ((GLOBAL_TABLE, False), (CHUNKED_TABLE, True)) if kind in chunked]
        wanted = _LENGTHS | {name: _TABLES[name] for name in tables}
        new = [_vector(name, dims) for name, dims in wanted.items()]
        positions = _vector("positions", ["tokens"], ir.DataType.INT64)
        self._positions(graph, build, positions)
        if "input_ids" in given:
            self._ids(build, given["input_ids"])
        # Whatever asks for the number of sequences is told one: the list.
        given["past_lengths"].replace_all_uses_with(build("Constant", value=ir.Tensor(np.zeros(1, np.int64))))
        graph.inputs.remove(given["past_lengths"])
        graph.inputs.extend([positions, *new])
        graph.insert_before(graph[0], build.nodes)
        self._logits(graph)
        for value in _values(graph):
            value.shape = _of_one_row(value.shape)
        return report(self, model, [*graph.inputs, *graph.outputs])

    @staticmethod
    def _ids(build: Builder, ids: ir.Value) -> None:
        row = build("Unsqueeze", ids, build.constant([0]))
        row.type, row.shape = ids.type, ir.Shape([1, "tokens"])
        for user, index in [(user, index) for user, index in ids.uses() if user is not row.producer()]:
            user.replace_input_with(index, row)
        ids.shape = ir.Shape(["tokens"])

    @staticmethod
    def _positions(graph: ir.Graph, build: Builder, positions: ir.Value) -> None:
        """Positions are past lengths plus a range where the decoder counts them itself."""
        computed = [node for node in graph if node.op_type == "Add" and any(
            value is not None and (maker := value.producer()) is not None and maker.op_type == "Range"
            for value in node.inputs)]
        assert len(computed) <= 1, "a decoder counts positions once"
        for node in computed:
            row = build("Unsqueeze", positions, build.constant([0]))
            row.type, row.shape = positions.type, ir.Shape([1, "tokens"])
            node.outputs[0].replace_all_uses_with(row)

    @staticmethod
    def _logits(graph: ir.Graph) -> None:
        index = next((index for index, value in enumerate(graph.outputs) if value.name == "logits"), None)
        if index is None:  # a pipeline's last stage has them
            return
        whole = graph.outputs[index]
        gather = whole.producer()
        if gather is None or gather.op_type != "AllGather":
            graph.outputs[index] = _squeezed(graph, whole, "logits")
        elif (part := gather.inputs[0]) is not None:  # parts are lists too, so that nothing is left to do behind it
            gather.replace_input_with(0, _squeezed(graph, part, str(part.name)))
            whole.shape = ir.Shape(list(whole.shape or ())[1:])


def _squeezed(graph: ir.Graph, row: ir.Value, name: str) -> ir.Value:
    """[1, rows, N] as [rows, N] under a name, that of the row included."""
    build, maker = Builder(name), row.producer()
    assert maker is not None
    row.name = f"{name}/row"
    logits: ir.Value = build("Squeeze", row, build.constant([0]))
    logits.name, logits.type, logits.shape = name, row.type, ir.Shape(list(row.shape or ())[1:])
    graph.insert_after(maker, build.nodes)
    return logits


def _vector(name: str, dims: list[str], dtype: ir.DataType = ir.DataType.INT32) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value of a graph that is computed or given, caches included."""
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _of_one_row(shape: ir.Shape | None) -> ir.Shape | None:
    """A shape of a batch as that of a list: [batch, tokens, D] is [1, tokens, D], [batch*tokens, D] is [tokens, D]."""
    names: dict[str, int | str] = {"batch": 1, "batch*tokens": "tokens", "tokens*batch": "tokens"}
    return None if shape is None else ir.Shape(
        [dim if isinstance(dim, int) else names.get(str(dim.value), dim.value) for dim in shape])
