"""Training over real processes (gloo): the losses and gradients of one process on every arrangement of ranks, also
after a rank was killed, and on another arrangement than before.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from herdgraph.errors import HerdError
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import MAVERICK, SCOUT, TINY
from herdgraph.model.training.parallel.expert_parallel import by_expert
from herdgraph.model.training.parallel.ranks import ParallelOptions, Ranks
from herdgraph.model.training.parallel.sharding import require_divisible
from support.forked_ranks import run_ranks
from support.training_worker import Case, train

ON_TWO = [
    Case(), Case(tensor=2),
    Case(expert=2, precision="fp8", directory="fp8-expert"),
    Case(tensor=2, precision="fp8", recipe="rowwise", directory="fp8-tensor"),
]
ON_FOUR = [Case(expert=2, pictures=True, top_k=2), Case(pictures=True), Case(expert=4, pictures=True),
           Case(tensor=2, pictures=True), Case(tensor=4)]
BEGUN = {"two": Case(expert=2, pictures=True, recompute=True),
         "four": Case(expert=2, tensor=2, pictures=True, recompute=True)}
OTHER = {"two": Case(tensor=2, pictures=True), "four": Case(expert=4, pictures=True)}
RESUMED = {name: [replace(begun, directory="same"), replace(OTHER[name], directory="other"),
                  replace(begun, directory="from-alone")] for name, begun in BEGUN.items()}
SKEWED = {name: replace(begun, recompute=False, skew=True) for name, begun in BEGUN.items()}
BROKEN = {name: replace(begun, recompute=False, broken=True) for name, begun in BEGUN.items()}
RANKS = {"two": 2, "four": 4}
RUNS = {name: [*cases, BEGUN[name], SKEWED[name], *RESUMED[name], BROKEN[name]]
        for name, cases in (("two", ON_TWO), ("four", ON_FOUR))}
"""What ranks train that are started once."""
NAMES = ["two", pytest.param("four", marks=pytest.mark.slow)]


def run(ranks: int, cases: list[Case], folder: Path) -> subprocess.CompletedProcess[str]:
    return run_ranks(ranks, "support.training_worker", json.dumps([asdict(case) for case in cases]), str(folder))


@cache
def alone(case: Case) -> dict[str, Any]:
    return train(replace(case, expert=1, tensor=1, recompute=False, directory=""), Ranks.alone())


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a run one of whose ranks died after step 3."""
    @cache
    def of(name: str) -> Path:
        folder = tmp_path_factory.mktemp("killed")
        assert run(RANKS[name], [replace(BEGUN[name], directory="run", kill_at=3)], folder).returncode != 0
        return folder / "run"

    return of


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, killed: Callable[[str], Path]) -> Callable[[str], Path]:
    """The folder in which a run has trained all its cases."""
    @cache
    def all_of(name: str) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        for begun in ("same", "other"):
            shutil.copytree(killed(name), folder / begun)
        with pytest.raises(KeyboardInterrupt):
            train(replace(RESUMED[name][2], expert=1, tensor=1, kill_at=3).among(folder), Ranks.alone())
        done = run(RANKS[name], RUNS[name], folder)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return all_of


@pytest.fixture(scope="module")
def found(trained: Callable[[str], Path]) -> Callable[[str, Case], dict[str, Any]]:
    """What a run has found in a case."""
    @cache
    def all_of(name: str) -> list[dict[str, Any]]:
        return torch.load(trained(name) / "results.pt")

    return lambda name, case: all_of(name)[RUNS[name].index(case)]


def named(case: Any) -> str | None:
    if not isinstance(case, Case):
        return None
    own = {name: value for name, value in asdict(case).items() if value != getattr(Case(), name)}
    return case.directory or "-".join(f"{name}={value}" for name, value in own.items()) or "fsdp"


FP8 = [case for case in ON_TWO if case.precision == "fp8"]
EXACT = [pytest.param(name, case, marks=[pytest.mark.slow] if name == "four" else [])
         for name, cases in RUNS.items() for case in cases if not case.directory and not case.broken]


@pytest.mark.parametrize(("run_name", "case"), EXACT, ids=named)
def test_ranks_learn_what_one_process_learns(run_name: str, case: Case, found: Callable[[str, Case], Any]) -> None:
    got, wanted = found(run_name, case), alone(case)
    assert got["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert got["norms"] == pytest.approx(wanted["norms"], rel=1e-4)  # Adam would hide a factor on gradients
    assert got["held_out"] == pytest.approx(wanted["held_out"], rel=1e-5)
    assert got["loads"] == wanted["loads"]
    assert got["gradients"].keys() == wanted["gradients"].keys()
    for name, gradient in wanted["gradients"].items():
        torch.testing.assert_close(got["gradients"][name], gradient, rtol=0, atol=float(gradient.abs().max()) * 1e-4)
    for kind in ("weights", "average"):
        assert got[kind].keys() == wanted[kind].keys()
        for name, value in wanted[kind].items():
            torch.testing.assert_close(got[kind][name], value, rtol=0, atol=1e-3, msg=f"{kind} {name}")


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_at_one_expert_is_the_worst_load(name: str, found: Callable[[str, Case], Any]) -> None:
    assert found(name, SKEWED[name])["loads"] == [[8.0, 8.0]] * 4


@pytest.mark.parametrize("case", FP8, ids=named)
def test_fp8_on_ranks_is_fp8_alone(case: Case, found: Callable[[str, Case], Any]) -> None:
    """As far as FP8 goes: ranks round the rows of an expert, or the parts of a sum, together or apart."""
    got, wanted = found("two", case), alone(case)
    assert got["losses"][0] == pytest.approx(wanted["losses"][0], rel=5e-4)
    assert got["losses"] == pytest.approx(wanted["losses"], rel=3e-3)
    assert got["amaxes"].keys() == wanted["amaxes"].keys()
    for name, amax in wanted["amaxes"].items():
        assert got["amaxes"][name].shape == amax.shape
        torch.testing.assert_close(got["amaxes"][name], amax, rtol=0.5, atol=0, msg=name)


@pytest.mark.parametrize("case", FP8, ids=named)
def test_what_fp8_remembers_is_whole_in_a_checkpoint(
    case: Case, found: Callable[[str, Case], Any], trained: Callable[[str], Path]
) -> None:
    resumed = train(replace(case, expert=1, tensor=1).among(trained("two")), Ranks.alone())
    assert resumed["losses"] == found("two", case)["losses"]
    for name, amax in found("two", case)["amaxes"].items():
        assert torch.equal(resumed["amaxes"][name], amax), name


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_is_no_number_on_one_rank_stops_all(name: str, found: Callable[[str, Case], Any]) -> None:
    told = found(name, BROKEN[name])["error"]
    assert told.startswith("step 3: the loss is nan; vision.vision_model.patch_embedding.linear is the first to give")


def _goes_on(found: dict[str, Any], begun: Case) -> None:
    assert len(found["norms"]) == 2
    assert found["losses"] == pytest.approx(alone(begun)["losses"], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", range(3), ids=["same", "other", "from-alone"])
def test_a_killed_run_goes_on_on_the_same_and_on_other_ranks(
    name: str, kept: int, found: Callable[[str, Case], Any]
) -> None:
    _goes_on(found(name, RESUMED[name][kept]), BEGUN[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_goes_on_alone(name: str, killed: Callable[[str], Path], tmp_path: Path) -> None:
    assert sorted(path.name for path in (killed(name) / "checkpoints").glob("step-*[0-9]"))[-1] == "step-00000002"
    shutil.copytree(killed(name), tmp_path / "run")
    _goes_on(train(Case(pictures=True, directory=str(tmp_path / "run")), Ranks.alone()), BEGUN[name])


def test_the_train_command_on_ranks_writes_a_whole_model(tmp_path: Path) -> None:
    from herdgraph.model.checkpoint import open_checkpoint
    from herdgraph.model.quantization.calibration_file import CalibrationFile
    from support import herds

    herds.save(HerdConfig(text=TINY.text), tmp_path / "checkpoint")
    herds.write_processor(tmp_path / "checkpoint")
    rows = [{"text": f"The herd of {number} grazes on the green hill. "} for number in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_ = tmp_path / "run"
    done = run_ranks(
        2, "support.train_command_worker", "train", "pretrain", "--checkpoint", str(tmp_path / "checkpoint"),
        "--data", str(tmp_path / "data.jsonl"), "--output", str(run_), "--rows", "1", "--seq-len", "64",
        "--train.steps", "3", "--optimizer.ema", "0.5", "--held-out", "0.2", "--train.precision", "fp8",
        "--parallel.expert", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    with open_checkpoint(run_ / "model") as trained, open_checkpoint(tmp_path / "checkpoint") as before:
        for name in ("layers.1.feed_forward.experts.down_proj", "layers.0.self_attn.q_proj.weight"):
            assert trained.read(name).shape == before.read(name).shape
            assert not torch.equal(trained.read(name), before.read(name).bfloat16())
            assert (trained.read(name) - before.read(name)).abs().max() < 0.02  # in its place, three steps away
        amax = CalibrationFile.open(run_ / "calibration", trained.fingerprint()).input_amax(
            "layers.1.feed_forward.experts.down_proj")
        assert amax.min() > 0


def test_rows_of_an_expert_lie_together_whatever_rank_sent_them() -> None:
    order = by_expert(torch.tensor([[2, 0, 1], [1, 3, 0]]), 7)
    assert order.tolist() == [0, 1, 3, 4, 5, 6, 2]  # expert 0 of both ranks, expert 1 of the second, expert 2


@pytest.mark.parametrize(("config", "parallel", "message"), [
    (SCOUT, ParallelOptions(tensor=3), "40 attention heads cannot be shared by parallel.tensor=3 ranks: choose "
                                       "parallel.tensor=2"),
    (SCOUT, ParallelOptions(tensor=20), "8 key/value heads cannot be shared by parallel.tensor=20 ranks: choose "
                                        "parallel.tensor=8"),
    (SCOUT, ParallelOptions(expert=12), "16 experts cannot be dealt to parallel.expert=12 x parallel.tensor=1 = 12 "
                                        "ranks: choose parallel.expert=8"),
    (MAVERICK, ParallelOptions(expert=32, tensor=8), "128 experts cannot be dealt to parallel.expert=32 x "
                                                     "parallel.tensor=8 = 256 ranks: choose parallel.expert=16"),
    (TINY, ParallelOptions(tensor=4), "2 key/value heads cannot be shared by parallel.tensor=4 ranks: choose "
                                      "parallel.tensor=2"),
    (replace(TINY, text=replace(TINY.text, expert_size=45)), ParallelOptions(tensor=2),
     "45 inner elements of the shared expert cannot be shared by parallel.tensor=2 ranks: choose parallel.tensor=1"),
    (HerdConfig(text=replace(TINY.text, moe_layers=(), num_experts=0)), ParallelOptions(expert=2),
     "0 experts cannot be dealt to parallel.expert=2 x parallel.tensor=1 = 2 ranks: choose parallel.expert=1"),
])
def test_what_cannot_be_divided_is_refused(config: HerdConfig, parallel: ParallelOptions, message: str) -> None:
    with pytest.raises(HerdError) as refused:
        require_divisible(config, parallel)
    assert str(refused.value) == message


def test_what_can_be_divided_is_not() -> None:
    require_divisible(SCOUT, ParallelOptions(expert=2, tensor=8))
    require_divisible(MAVERICK, ParallelOptions(expert=16, tensor=8))
    require_divisible(HerdConfig(text=replace(TINY.text, moe_layers=(), num_experts=0)), ParallelOptions(tensor=2))


def test_processes_that_cannot_be_arranged_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HerdError, match=r"^1 process cannot be arranged in groups of parallel.expert=2 x "
                                        r"parallel.tensor=2 = 4: start 4 with torchrun"):
        Ranks.from_environment(ParallelOptions(expert=2, tensor=2))
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(HerdError, match=r"^6 processes .* = 4: start 8 .*, or choose a product of 3$"):
        Ranks.from_environment(ParallelOptions(expert=2, tensor=2))
    with pytest.raises(HerdError, match=r"^parallel.tensor is 0, it must be at least 1$"):
        ParallelOptions(tensor=0)
