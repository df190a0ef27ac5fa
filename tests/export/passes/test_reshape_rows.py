"""ReshapeRows: views instead of shapes that are computed, only where a row of tokens becomes a list or back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from herdgraph.export.passes import ReshapeRows, Tidy
from support import graphs

MODEL = """
rows (float[1, tokens, 4] x, float[2, tokens, 4] two) => (float[1, tokens, 4] y, float[2, N] z) {
    flat = Constant <value_ints = [-1, 4]> ()
    width = Constant <value_ints = [4]> ()
    row = Constant <value_ints = [1]> ()
    other = Constant <value_ints = [2, -1]> ()
    list = Reshape (x, flat)
    sizes = Shape <start = 1, end = 2> (x)
    shape = Concat <axis = 0> (row, sizes, width)
    minus = Neg (list)
    y = Reshape (minus, shape)
    z = Reshape (two, other)
}"""


def _model() -> ir.Model:
    model = graphs.parse(MODEL)
    shapes = {"list": ["tokens", 4], "minus": ["tokens", 4]}
    for node in model.graph:
        node.name = node.outputs[0].name
        if node.name in shapes:
            node.outputs[0].shape = ir.Shape(shapes[node.name])
    return model


def test_rows_become_lists_without_their_size() -> None:
    model, x = _model(), {"x": np.ones((1, 3, 4), np.float32), "two": np.ones((2, 3, 4), np.float32)}
    wanted = graphs.run(model, **x)
    assert ReshapeRows()(model).modified
    Tidy()(model)
    found = graphs.operators(model)
    assert (found["Squeeze"], found["Unsqueeze"], found["Reshape"], found["Shape"]) == (1, 1, 1, 0)
    for ours, theirs in zip(graphs.run(model, **x), wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not ReshapeRows()(model).modified


def test_a_row_that_is_a_list_again_is_the_list() -> None:
    model = graphs.parse("""
    g (float[tokens, 4] x) => (float[tokens, 4] y) {
        axis = Constant <value_ints = [0]> ()
        row = Unsqueeze (x, axis)
        list = Squeeze (row, axis)
        y = Neg (list)
    }""")
    for node in model.graph:
        if node.op_type == "Squeeze":
            node.outputs[0].shape = ir.Shape(["tokens", 4])
    ReshapeRows()(model)
    Tidy()(model)
    assert graphs.operators(model) == {"Neg": 1}
