"""The embedding table in 8 bits: rows come back within half a step, and a recipe without a rule for it keeps floats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from herdgraph.export.passes import QuantizeTable
from herdgraph.export.weights.channel import RowCodes, RowScales
from herdgraph.model.quantization.formats import ChannelFormat
from herdgraph.model.quantization.recipes import RECIPES, Recipe, Rule
from support.graphs import operators, parse, run

TABLE = "embed_tokens.weight"


def _table() -> np.ndarray:
    random = np.random.default_rng(0)
    return (random.normal(size=(40, 24)) * 10.0 ** random.uniform(-3, 3, (40, 1))).astype(np.float32)


def _graph(table: np.ndarray) -> ir.Model:
    model = parse("g (int64[t] ids, float[40, 24] table) => (float[t, 24] x) { x = Gather <axis = 0> (table, ids) }",
                  table=table)
    value = model.graph.initializers.pop("table")
    value.name = TABLE
    assert value.const_value is not None
    value.const_value.name = TABLE
    model.graph.initializers[TABLE] = value
    return model


def test_rows_are_within_half_a_step_of_their_largest_number() -> None:
    table, ids = _table(), np.array([3, 39, 0, 3])
    model = _graph(table)
    assert QuantizeTable(RECIPES["int8"])(model).modified
    found = run(model, ids=ids)[0]
    assert (np.abs(found - table[ids]) <= np.abs(table[ids]).max(1, keepdims=True) / 127 * 0.501).all()
    assert operators(model)["Gather"] == 2
    assert TABLE not in model.graph.initializers


@pytest.mark.parametrize("recipe", [RECIPES["fp32"], RECIPES["fp8"], RECIPES["int8"].centered(),
                                    Recipe("all", "", (Rule("*", ChannelFormat()),))], ids=lambda recipe: recipe.name)
def test_no_rule_about_the_table_keeps_it_in_floats(recipe: Recipe) -> None:
    assert not QuantizeTable(recipe)(_graph(_table())).modified


def test_written_codes_are_the_ones_in_memory(tmp_path: Path) -> None:
    table = _table()
    codes = RowCodes(ir.Tensor(table))
    with (tmp_path / "codes").open("wb") as file:
        codes.write_to(file.fileno(), 5)
    found = np.frombuffer((tmp_path / "codes").read_bytes()[5:], np.int8).reshape(table.shape)
    np.testing.assert_array_equal(found, RowCodes(ir.Tensor(table)).numpy())
    np.testing.assert_allclose(found * RowScales(codes).numpy(), table, atol=np.abs(table).max() / 127)
