"""A rank's part of Scout's and Maverick's real layers on the hollow device: kernels, and what a token costs.

Partitions run one after the other without the exchanges between them, which ``test_ranks.py`` sees.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from herdgraph.model.config import HerdConfig
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.model.quantization.recipes import Caches
from support.hollow_cuda import graphs
from support.hollow_cuda.decoder import PROVIDER, SESSION, call, lowered_rank
from support.hollow_cuda.device import run
from support.hollow_cuda.kernels import FLASH, GROUPED_ON_HOPPER, SPLIT, UNPACKING_EXPERTS_OF_ROW
from support.hollow_cuda.layers import MAVERICK_PAIR, SCOUT_PAIR, narrow
from support.hollow_cuda.report import Report

pytestmark = pytest.mark.slow

MODELS = {"Scout": SCOUT_PAIR, "Maverick": MAVERICK_PAIR}
LAUNCHES_PER_LAYER = {"tp=2": 30.25, "ep=2": 32.25}
"""A rank that has some of the experts sets the rows of others to 0."""
RANKS = [("tp=2", 0), ("ep=2", 1), ("pp=2", 0), ("pp=2", 1)]


def reports(
    config: HerdConfig, plan: str, rank: int, directory: Path, recipe: str = "bf16", caches: Caches = "float",
) -> dict[str, Report]:
    """What a rank does with a token and with one of each of eight sequences, all partitions together."""
    paths = []
    for index, model in enumerate(lowered_rank(config, ShardPlan.parse(plan), rank, recipe, caches)):
        folder = directory / str(index)
        folder.mkdir(parents=True)
        paths.append(graphs.save(model, folder))
    chunk = config.text.attention_chunk_size
    calls = {"token": (100,), "tokens": (100, 3, 5, 700, 9, 1, 0, 64)}
    return run([call(name, chunk, [(past, 1) for past in pasts]) for name, pasts in calls.items()], *paths,
               session=SESSION, provider=PROVIDER)


def check(found: dict[str, Report], recipe: str, caches: Caches, *, attention: int, experts: int) -> None:
    """Nothing is allocated or read back, and the kernels are those of the whole model."""
    for name in ("token", "tokens"):
        report = found[f"{name}/eager"]
        assert not report.allocations, report.summary()
        assert not report.reads_by_host, report.summary()
        assert not report.writes_by_host, report.summary()
        assert report.count(FLASH if caches == "float" else SPLIT) == attention, report.summary()
    products = GROUPED_ON_HOPPER if recipe == "bf16" else UNPACKING_EXPERTS_OF_ROW
    assert found["token/eager"].count(products) == 2 * experts, found["token/eager"].summary()
    print(f"\n{recipe} {caches}, {attention} layers, {experts} mixtures: {found['token/eager'].launches} launches")


@pytest.mark.parametrize(("plan", "rank"), RANKS)
@pytest.mark.parametrize("model", MODELS)
def test_layers_of_a_rank(weights: Path, model: str, plan: str, rank: int) -> None:
    """Real sizes in bfloat16; a stage of the pair is one layer, of Maverick's the first has no experts."""
    found = reports(MODELS[model], plan, rank, weights)
    layers = [rank] if plan == "pp=2" else [0, 1]
    experts = sum(layer in MODELS[model].text.moe_layers for layer in layers)
    check(found, "bf16", "float", attention=len(layers), experts=experts)


@pytest.mark.parametrize("plan", ["tp=2", "ep=2"])
@pytest.mark.parametrize(("recipe", "caches"), [("int8", "int8"), ("int4", "fp8")])
def test_integers_and_caches_in_8_bits(weights: Path, recipe: str, caches: Caches, plan: str) -> None:
    check(reports(SCOUT_PAIR, plan, 1, weights, recipe, caches), recipe, caches, attention=2, experts=2)


@pytest.mark.parametrize("plan", ["tp=2", "ep=2"])
@pytest.mark.parametrize(("recipe", "caches"), [("bf16", "float"), ("bf16", "int8"), ("int4", "float")])
def test_launches_of_a_layer(weights: Path, recipe: str, caches: Caches, plan: str) -> None:
    """What one more layer of either kind adds on a rank, the two exchanges left out."""
    pair, with_chunked, with_global = (
        reports(narrow(*chunked), plan, 0, weights / str(number), recipe, caches)
        for number, chunked in enumerate(((True, False), (True, True, False), (True, False, False))))
    for name in ("token", "tokens"):
        least, of_chunked, of_global = (each[f"{name}/eager"].launches for each in (pair, with_chunked, with_global))
        of_chunked, of_global = of_chunked - least, of_global - least
        print(f"\n{plan} {recipe} {caches} {name}: chunked {of_chunked}, global {of_global}, "
              f"beside layers {least - of_chunked - of_global}")
        assert (3 * of_chunked + of_global) / 4 <= LAUNCHES_PER_LAYER[plan]
