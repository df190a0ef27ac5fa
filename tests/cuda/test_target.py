"""Decoders of the target ``cuda`` on the hollow device: where they run, by which kernels, and what a token costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from herdgraph.model.config import HerdConfig
from herdgraph.model.quantization.recipes import Caches
from support.herds import TWO_LAYERS, variant
from support.hollow_cuda import graphs
from support.hollow_cuda.decoder import PROVIDER, SESSION, call, lowered
from support.hollow_cuda.device import Call, run
from support.hollow_cuda.kernels import (
    FLASH,
    GATHERED,
    GROUPED_ON_HOPPER,
    SPLIT,
    UNPACKING_EXPERTS,
    UNPACKING_EXPERTS_OF_ROW,
)
from support.hollow_cuda.layers import MAVERICK_PAIR, SCOUT_PAIR, narrow
from support.hollow_cuda.report import Report

pytestmark = pytest.mark.slow

LAUNCHES_PER_LAYER: dict[Caches, float] = {"float": 29.25, "int8": 30.25}
"""Reading pages of 8 bits takes a second kernel, which joins what the first has split."""
RECIPES: tuple[str, ...] = ("bf16", "int8", "int4")
CACHES: tuple[Caches, ...] = ("float", "int8", "fp8")


def reports(
    config: HerdConfig, directory: Path, recipe: str = "bf16", caches: Caches = "float", generation: int = 90,
) -> dict[str, Report]:
    """What a decoder does with a token, with one of each of eight sequences, and with a prompt beside tokens."""
    path = graphs.save(lowered(config, recipe, caches), directory)
    chunk = config.text.attention_chunk_size
    return run([
        call("token", chunk, [(100, 1)], record=True),
        call("tokens", chunk, [(past, 1) for past in (100, 3, 5, 700, 9, 1, 0, 64)], record=True),
        call("ragged", chunk, [(0, min(64, chunk or 64)), (100, 1), (3, 1)]),
    ], path, session=SESSION, provider=PROVIDER, generation=generation)


def check_decoding(found: dict[str, Report]) -> None:
    """A token is one graph, and nothing in it waits, allocates, or talks to the host."""
    for name in ("token", "tokens"):
        eager, replay = found[f"{name}/eager"], found[f"{name}/replay"]
        assert not eager.allocations, eager.summary()
        assert not eager.reads_by_host, eager.summary()
        assert not eager.writes_by_host, eager.summary()
        assert len(eager.of("synchronize")) == 1, "the end of a call is all that is waited for"
        assert [event["event"] for event in replay.events] == ["replay", "synchronize"]
        assert replay.of("replay")[0]["steps"] >= eager.launches, "the graph holds all that runs without one"


def check_kernels(found: dict[str, Report], recipe: str, caches: Caches, *, attention: int, experts: int) -> None:
    """The kernels that the layers of a decoder are meant to run by."""
    token, ragged = found["token/eager"], found["ragged/eager"]
    row, rows = (GROUPED_ON_HOPPER,) * 2 if recipe == "bf16" else (UNPACKING_EXPERTS_OF_ROW, UNPACKING_EXPERTS)
    assert token.count(row) == 2 * experts, token.summary()
    assert ragged.count(rows) == 2 * experts, ragged.summary()
    assert token.count(FLASH if caches == "float" else SPLIT) == attention, token.summary()
    assert token.count(GATHERED) == 0, "decoding reads the past where it lies"
    assert ragged.count(FLASH if caches == "float" else GATHERED) == attention, ragged.summary()


@pytest.mark.parametrize("caches", CACHES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_of_scout(weights: Path, recipe: str, caches: Caches) -> None:
    found = reports(SCOUT_PAIR, weights, recipe, caches)
    check_decoding(found)
    check_kernels(found, recipe, caches, attention=2, experts=2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_of_maverick(weights: Path, recipe: str) -> None:
    """A dense layer and one of 128 experts."""
    found = reports(MAVERICK_PAIR, weights, recipe)
    check_decoding(found)
    check_kernels(found, recipe, "float", attention=2, experts=1)


@pytest.mark.parametrize(
    ("recipe", "caches"), [("bf16", "float"), ("bf16", "int8"), ("int8", "float"), ("int4", "float")])
def test_launches_of_a_layer(weights: Path, recipe: str, caches: Caches) -> None:
    """What one more layer of either kind adds, and what Scout, of which every fourth is global, has on average."""
    found = []
    for chunked in ((True, False), (True, True, False), (True, False, False)):
        directory = weights / str(len(found))
        directory.mkdir()
        found.append(reports(narrow(*chunked), directory, recipe, caches))
    for name in ("token", "tokens", "ragged"):
        pair, with_chunked, with_global = (each[f"{name}/eager"].launches for each in found)
        of_chunked, of_global = with_chunked - pair, with_global - pair
        beside = pair - of_chunked - of_global
        print(f"\n{recipe} {caches} {name}: chunked {of_chunked}, global {of_global}, beside layers {beside}")
        if name != "ragged":
            assert (3 * of_chunked + of_global) / 4 <= LAUNCHES_PER_LAYER[caches]


@pytest.mark.parametrize("recipe", ["bf16", "int4"])
@pytest.mark.parametrize("generation", [80, 89, 120])
def test_other_generations(weights: Path, generation: int, recipe: str) -> None:
    """An A100, an L40S, a desktop's Blackwell."""
    check_decoding(reports(narrow(True, False), weights, recipe, generation=generation))


@pytest.mark.parametrize("text", [
    {}, {"rope_layers": (True, True)}, {"attention_chunk_size": 0, "chunked_layers": (False, False)}, {"top_k": 2},
    {"tie_word_embeddings": True}, {"use_qk_norm": False, "attn_temperature_tuning": False, "num_experts": 7},
], ids=["plain", "rotated global", "without chunks", "top-2", "tied", "without norms"])
def test_other_herds(weights: Path, text: dict[str, Any]) -> None:
    check_decoding(reports(variant(**(TWO_LAYERS | text)), weights))


def test_pictures(weights: Path) -> None:
    """A decoder that takes features, and the tower, whose shapes are computed on the host without a look at values."""
    config = variant(vision=True, **TWO_LAYERS)
    check_decoding(reports(config, weights))
    tower = graphs.save(lowered(config, "bf16", tower=True), weights)
    found = run([Call("tiles", {"tiles": 3, "image_tokens": 12})], tower, provider=PROVIDER,
                session=SESSION | {"session.disable_cpu_ep_fallback": "0"})
    assert found["tiles/eager"].launches
    assert not found["tiles/eager"].reads_by_host
