"""PackTokens: the interface of a list of tokens, for decoders, stages and ranks; image towers are left alone."""

from __future__ import annotations

from functools import cache

import onnx_ir as ir
import pytest

from herdgraph.export.graph.capture import capture_decoder, capture_vision
from herdgraph.export.passes import KeepStage, PackTokens, SplitWidth
from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan
from support import graphs, herds

_captured = cache(capture_decoder)


def _packed(name: str = "", plan: ShardPlan | None = None, rank: int = 0) -> ir.Model:
    config = herds.VARIANTS[name] if name else TINY
    model = _captured(config).clone()
    if plan:
        KeepStage(plan, rank, config.text.num_layers)(model)
        SplitWidth(plan, rank, config)(model)
    PackTokens()(model)
    return model


def _shapes(values: list[ir.Value]) -> dict[str, str]:
    return {str(value.name): str(value.shape) for value in values
            if not str(value.name).startswith(("past.", "present."))}


def test_the_interface_of_a_decoder() -> None:
    model = _packed()
    assert _shapes(model.graph.inputs) == {
        "input_ids": "[tokens]", "positions": "[tokens]", "logit_rows": "[rows]", "image_features": "[image_tokens,64]",
        "cumulative_lengths": "[sequences_plus_1]", "past_lengths": "[sequences]",
        "block_table.global": "[sequences,global_blocks]", "block_table.chunked": "[sequences,chunked_blocks]",
    }
    assert _shapes(model.graph.outputs) == {"logits": "[rows,512]"}
    [counted] = [user for node in model.graph if node.op_type == "Range" for user, _ in node.outputs[0].uses()]
    assert not counted.outputs[0].uses(), "positions are given"


@pytest.mark.parametrize(("name", "tables"), [
    ("no-chunks", {"block_table.global"}), ("rope-everywhere", {"block_table.chunked"}),
])
def test_tables_of_the_kinds_of_layers_there_are(name: str, tables: set[str]) -> None:
    assert {name for name in _shapes(_packed(name).graph.inputs) if "table" in name} == tables


def test_inside_the_list_is_a_batch_of_one_row() -> None:
    dims = {str(dim) for node in _packed().graph for value in node.outputs if value.shape for dim in value.shape}
    assert "tokens" in dims
    assert not [dim for dim in dims if "batch" in dim]


def test_later_stages_take_hidden_states() -> None:
    first, last = (_packed(plan=ShardPlan(1, 1, 2), rank=rank) for rank in range(2))
    assert "input_ids" in _shapes(first.graph.inputs)
    assert _shapes(first.graph.outputs) == {"hidden.2": "[1,tokens,64]"}
    assert _shapes(last.graph.outputs) == {"logits": "[rows,512]"}
    assert _shapes(last.graph.inputs)["hidden.2"] == "[1,tokens,64]"


def test_ranks_gather_lists_and_do_nothing_behind_it() -> None:
    graph = _packed(plan=ShardPlan(2)).graph
    [logits] = [value for value in graph.outputs if value.name == "logits"]
    gather = logits.producer()
    assert gather is not None
    assert gather.op_type == "AllGather"
    assert [str(value.shape) for value in (gather.inputs[0], logits) if value] == ["[rows,256]", "[rows,512]"]


def test_image_towers_are_left_alone() -> None:
    model = capture_vision(TINY)
    before = graphs.operators(model)
    assert not PackTokens()(model).modified
    assert graphs.operators(model) == before
