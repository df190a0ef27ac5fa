"""AddBestToken: an output beside the logits, where a graph has all of them."""

from __future__ import annotations

import numpy as np

from herdgraph.export.passes import AddBestToken
from herdgraph.export.passes.shard.partition import partition_at_collectives
from support import graphs


def test_the_first_of_the_largest_logits() -> None:
    model = graphs.parse("g (float[rows, 5] x) => (float[rows, 5] logits) { logits = Neg (x) }")
    assert AddBestToken()(model).modified
    assert [str(value.shape) for value in model.graph.outputs] == ["[rows,5]", "[rows]"]
    _, best = graphs.run(model, x=np.float32([[3, 1, 2, 1, 4], [0, 0, 0, 0, 0]]))
    assert best.tolist() == [1, 0]
    assert best.dtype == np.int64


def test_ranks_have_it_of_joined_logits_and_towers_do_not() -> None:
    ranks = graphs.parse("""
    g (float[rows, 5] x) => (float[rows, 10] logits) { logits = herdgraph.AllGather <width = 2, axis = 1> (x) }""")
    assert AddBestToken()(ranks).modified
    before, after = partition_at_collectives(ranks)
    assert [exchange.result for exchange in before.after] == ["logits"]
    assert [str(value.name) for value in (*after.model.graph.inputs, *after.model.graph.outputs)] == ["logits", "best"]
    tower = graphs.parse("g (float[N, 5] x) => (float[N, 5] image_features) { image_features = Neg (x) }")
    assert not AddBestToken()(tower).modified
