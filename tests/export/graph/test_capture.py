"""The canonical graph: readable, without weights, and of the same size for any number of experts."""

from __future__ import annotations

import pytest

from herdgraph.export.graph import capture
from herdgraph.model.config.names import expected_tensors
from herdgraph.model.config.presets import TINY
from support import graphs, herds
from support.capture_cache import uncached

capture_decoder, capture_vision = uncached(capture.capture_decoder), uncached(capture.capture_vision)


@pytest.fixture(scope="module")
def decoder():
    return capture_decoder(TINY)


def test_operators_are_the_models_own(decoder) -> None:
    found = graphs.operators(decoder)
    assert found["CachedAttention"] == 4
    assert found["RoutedExperts"] == 2
    assert found["RotaryEmbedding"] == 2 * 3, "queries and keys of the three layers that rotate"
    assert found["RMSNormalization"] == 4 * 2 + 1 + 2 * 3
    chunks = [node.attributes["chunk"].as_int() for node in decoder.graph if node.op_type == "CachedAttention"]
    assert chunks == [16, 16, 16, 0]


def test_names_mirror_modules(decoder) -> None:
    names = {node.name for node in decoder.graph}
    assert {"layers.3.feed_forward.experts", "layers.0.self_attn", "layers.0.self_attn.q_proj", "norm"} <= names
    assert len(names) == len(list(decoder.graph)), "names are unique"
    values = [output.name for node in decoder.graph for output in node.outputs]
    assert len(values) == len(set(values))


def test_interface(decoder) -> None:
    values = (*decoder.graph.inputs, *decoder.graph.outputs)
    shapes = {value.name: [str(dim) for dim in value.shape] for value in values}
    assert shapes["input_ids"] == ["batch", "tokens"]
    assert shapes["image_features"] == ["image_tokens", "64"]
    assert shapes["past.3.value"] == shapes["present.3.value"] == ["batch", "2", "slots_3", "16"]
    assert shapes["logits"] == ["batch", "rows", "512"]


def test_initializers_are_checkpoint_names_and_hold_nothing(decoder) -> None:
    vision = capture_vision(TINY)
    unbound = {name for graph in (decoder.graph, vision.graph) for name, value in graph.initializers.items()
               if value.const_value is None}
    assert unbound == set(expected_tensors(TINY))


def test_no_exporter_bookkeeping_is_left(decoder) -> None:
    assert not any(node.metadata_props for node in decoder.graph)


def test_experts_do_not_grow_the_graph() -> None:
    sizes = {
        experts: len(capture_decoder(herds.variant(**herds.TWO_LAYERS, num_experts=experts)).graph)
        for experts in (1, 4, 128)
    }
    assert len(set(sizes.values())) == 1, sizes


def test_text_only_models_take_no_features() -> None:
    model = capture_decoder(herds.variant(**herds.TWO_LAYERS))
    assert "image_features" not in {value.name for value in model.graph.inputs}
    assert not any(node.op_type == "CumSum" for node in model.graph)
