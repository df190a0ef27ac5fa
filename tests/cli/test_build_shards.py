"""The build command with --shards: what it says, what it refuses, and what the planner chooses for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from herdgraph.cli import main
from herdgraph.export.memory_plan import memory_plan
from herdgraph.model.config.presets import MAVERICK
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.model.quantization.recipes import RECIPES
from support import herds


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("build") / "checkpoint"
    herds.save(herds.variant(), directory)
    return directory


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_split_bundle_is_built_and_inspected(checkpoint: Path, tmp_path: Path) -> None:
    done = _run("build", checkpoint, "-o", tmp_path / "b", "--shards", "tp=2,pp=2", "--json")
    assert done.exit_code == 0, done.output
    built = json.loads(done.output)
    assert len(built["rank_bytes"]) == 4
    assert sum(built["rank_bytes"]) == built["bundle_bytes"] < built["bytes"]
    shown = _run("inspect", tmp_path / "b")
    assert shown.exit_code == 0, shown.output
    assert "tp=2,ep=1,pp=2" in shown.output
    assert "rank3/decoder.data" in shown.output


@pytest.mark.parametrize("arguments", [["--shards", "tp=2,ep=2"], ["--shards", "auto", "--devices", "2x1GB"]])
def test_a_dry_run_tells_the_ranks(checkpoint: Path, tmp_path: Path, arguments: list[str]) -> None:
    done = _run("build", checkpoint, "-o", tmp_path / "b", "--dry-run", *arguments)
    assert done.exit_code == 0, done.output
    assert "ranks, the largest about" in done.output or "1 ranks" in done.output
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--shards", "tp=3"], "4 attention heads cannot be split over 3 ranks evenly; the nearest that does is tp=2"),
    (["--shards", "two"], "'two' is not understood in the plan 'two': write it as tp=2,ep=4,pp=2"),
    (["--shards", "tp=2", "--target", "canonical"], "target canonical is not lowered and runs on one device"),
    (["--shards", "auto"], "--shards is auto and --devices not given: give --devices with --shards auto"),
    (["--devices", "8x80GB"], "--shards is not given and --devices 8x80GB"),
])
def test_refusals_are_one_line_before_anything_is_done(
    checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = _run("build", checkpoint, "-o", tmp_path / "b", *arguments)
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert not (tmp_path / "b").exists()


def test_memory_of_ranks(tmp_path: Path) -> None:
    """Ranks add up to the whole and what is replicated."""
    whole = memory_plan(MAVERICK, tmp_path / "b", RECIPES["fp32"])
    split = memory_plan(MAVERICK, tmp_path / "b", RECIPES["fp32"], ShardPlan(2, 4))
    text = MAVERICK.text
    routers = len(text.moe_layers) * text.num_experts * text.hidden_size
    norms = (2 * text.num_layers + 1) * text.hidden_size
    assert split.bundle_bytes - whole.bundle_bytes == 4 * 7 * (routers + norms)
    assert whole.rank_bytes == []
