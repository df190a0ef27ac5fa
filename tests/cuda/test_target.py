"""Decoders of the target ``cuda`` on the hollow device: where they run, by which kernels, and what a token costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from herdgraph.model.config import HerdConfig, TextConfig
from herdgraph.model.config.presets import MAVERICK, SCOUT
from support.herds import VARIANTS, variant
from support.hollow_cuda import graphs
from support.hollow_cuda.decoder import PROVIDER, SESSION, call, lowered
from support.hollow_cuda.device import run
from support.hollow_cuda.report import Report

pytestmark = pytest.mark.slow

LAUNCHES_PER_LAYER = 30
LAUNCHES_BESIDE = 16
"""Of the embedding, of lengths and positions, of the last norm and of the head."""
RECIPES = ["bf16", "int8", "int4"]
CACHES = ["float", "int8", "fp8"]


def with_layers(config: HerdConfig, *, moe: tuple[bool, ...], rotated: tuple[bool, ...]) -> HerdConfig:
    """Some layers of a model's real size; those that rotate attend in chunks."""
    text: TextConfig = replace(
        config.text, num_layers=len(moe), moe_layers=tuple(layer for layer, routed in enumerate(moe) if routed),
        rope_layers=rotated, chunked_layers=rotated)
    return HerdConfig(text=text)


SCOUT_PAIR = with_layers(SCOUT, moe=(True, True), rotated=(True, False))
MAVERICK_PAIR = with_layers(MAVERICK, moe=(False, True), rotated=(True, False))


def reports(config: HerdConfig, directory: Path, recipe: str = "bf16", caches: str = "float") -> dict[str, Report]:
    """What a decoder does with a token, with one of each of eight sequences, and with prompts beside tokens."""
    path = graphs.save(lowered(config, recipe, caches), directory)
    chunk = config.text.attention_chunk_size
    return run([
        call("token", chunk, [(100, 1)], record=True),
        call("tokens", chunk, [(past, 1) for past in (100, 3, 5, 700, 9, 1, 0, 64)], record=True),
        call("ragged", chunk, [(0, min(64, chunk or 64)), (100, 1), (3, 1)]),
    ], path, session=SESSION, provider=PROVIDER)


def check_decoding(found: dict[str, Report], layers: int) -> None:
    """A token is one graph: as many launches as promised, and nothing that waits, copies or allocates."""
    for name in ("token", "tokens"):
        eager, replay = found[f"{name}/eager"], found[f"{name}/replay"]
        assert eager.launches <= LAUNCHES_PER_LAYER * layers + LAUNCHES_BESIDE, eager.summary()
        assert not eager.reads_by_host, eager.summary()
        assert not eager.allocations, eager.summary()
        assert not eager.copies("host", "device"), eager.summary()
        assert len(eager.of("synchronize")) <= 1, "the end of a call is all that is waited for"
        assert [event["event"] for event in replay.events if event["event"] != "synchronize"] == ["replay"]
        assert replay.of("replay")[0]["steps"] >= eager.launches, "the graph holds all that runs without one"


@pytest.mark.parametrize("caches", CACHES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_of_scout(weights: Path, recipe: str, caches: str) -> None:
    found = reports(SCOUT_PAIR, weights, recipe, caches)
    check_decoding(found, layers=2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_of_maverick(weights: Path, recipe: str) -> None:
    """A dense layer and one of 128 experts."""
    check_decoding(reports(MAVERICK_PAIR, weights, recipe), layers=2)


@pytest.mark.parametrize("name", [
    "moe-every-second-layer", "dense", "no-qk-norm", "no-chunks", "rope-everywhere", "no-temperature", "top-2", "tied",
    "1-expert", "7-experts",
])
def test_herds(weights: Path, name: str) -> None:
    config = VARIANTS[name]
    check_decoding(reports(config, weights), config.text.num_layers)


@pytest.mark.parametrize("recipe", RECIPES)
def test_launches_of_one_more_layer(weights: Path, recipe: str) -> None:
    """What a layer adds is known from decoders of four and of eight."""
    launches = []
    for layers in (4, 8):
        flags = tuple((layer + 1) % 4 != 0 for layer in range(layers))
        config = variant(num_layers=layers, moe_layers=tuple(range(layers)), rope_layers=flags, chunked_layers=flags)
        directory = weights / str(layers)
        directory.mkdir()
        launches.append(reports(config, directory, recipe)["token/eager"].launches)
    assert launches[1] - launches[0] <= 4 * LAUNCHES_PER_LAYER
