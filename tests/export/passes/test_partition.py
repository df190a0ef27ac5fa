"""Cuts: as few as there must be, every value computed once, and the numbers of the graph that was cut."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from herdgraph.export.passes.shard.partition import Partition, partition_at_collectives
from support import graphs

CHAIN = """
g (float[T, 4] x, bool c) => (float[T, 4] y, float[T, 4] kept) {
    two = Constant <value = float {2.0}> ()
    n = Shape (x)
    a = Mul (x, two)
    kept = Neg (a)
    b = Abs (x)
    left = herdgraph.AllReduce <width = 2> (a)
    right = herdgraph.AllReduce <width = 2> (b)
    sum = Add (left, right)
    ones = ConstantOfShape <value = float[1] {1.0}> (n)
    d = Add (sum, ones)
    e = Mul (d, two)
    f = If (c) <
        then_branch = then () => (t) { t = Add (e, a) },
        else_branch = other () => (u) { u = Sub (e, b) }
    >
    whole = herdgraph.AllReduce <width = 2> (f)
    y = Add (whole, sum)
}
"""


def _typed(text: str) -> ir.Model:
    model = graphs.parse(text)
    for node in model.graph:
        for value in node.outputs:
            if value.type is None and node.op_type != "Shape":
                value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("T", 4))
    return model


def _run(partitions: list[Partition], ranks: int, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Equal ranks: a sum is one's part times their number."""
    values = dict(inputs)
    for partition in partitions:
        given = {value.name: values[value.name] for value in partition.model.graph.inputs}
        names = [value.name for value in partition.model.graph.outputs]
        values |= dict(zip(names, graphs.run(partition.model, **given), strict=True))
        values |= {exchange.result: ranks * values[exchange.value] for exchange in partition.after}
    return values


@pytest.mark.parametrize("condition", [True, False])
def test_numbers(condition: bool) -> None:
    x, c = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32), np.asarray(condition)
    y, kept = graphs.run(_typed(CHAIN), x=x, c=c)
    found = _run(partition_at_collectives(_typed(CHAIN)), 1, x=x, c=c)
    np.testing.assert_array_equal(found["y"], y)
    np.testing.assert_array_equal(found["kept"], kept)
    a, b = 2 * x, np.abs(x)
    f = 2 * (2 * a + 2 * b + 1) + (a if condition else -b)
    found = _run(partition_at_collectives(_typed(CHAIN)), 2, x=x, c=c)["y"]
    np.testing.assert_allclose(found, 2 * f + 2 * a + 2 * b, rtol=1e-6)


def test_collectives_of_one_level_share_a_cut() -> None:
    partitions = partition_at_collectives(_typed(CHAIN))
    assert [[exchange.value for exchange in partition.after] for partition in partitions] == [["a", "b"], ["f"], []]
    assert [[value.name for value in partition.model.graph.inputs] for partition in partitions[1:]] == [
        ["x", "left", "right", "c", "a", "b"], ["whole", "sum"]], "what only a branch reads is handed in too"
    constants = [sum(node.op_type == "Constant" for node in partition.model.graph) for partition in partitions]
    assert constants == [1, 1, 0], "a constant lives where it is used"
    assert sum(node.op_type == "Shape" for partition in partitions for node in partition.model.graph) == 1


def test_what_crosses_without_a_type_is_a_defect() -> None:
    model = graphs.parse(CHAIN)
    with pytest.raises(AssertionError, match="crosses a cut and has no type"):
        partition_at_collectives(model)


def test_without_collectives_there_is_one_partition() -> None:
    (partition,) = partition_at_collectives(graphs.parse("g (float[2] x) => (float[2] y) { y = Neg (x) }"))
    assert (partition.before, partition.after) == ((), ())
    np.testing.assert_array_equal(graphs.run(partition.model, x=np.ones(2, np.float32))[0], [-1, -1])
