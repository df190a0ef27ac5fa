"""Bits under a size: where they go, what becomes of the recipe and the bundle, and sizes that cannot be met."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from herdgraph.calibration.calibrate import calibrate
from herdgraph.calibration.windows import data_of
from herdgraph.errors import HerdError
from herdgraph.export.allocation import Choice, Part, allocate, parts_of
from herdgraph.export.pipeline import build_bundle, plan_build
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.checkpoint.tensors.write import write_tensors
from herdgraph.model.config.parameter_counts import model_size
from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.model.data import Record
from herdgraph.model.quantization.calibration_file import RESIDUAL_SHARE, SCALES
from herdgraph.runtimes import Engine
from herdgraph.runtimes.bundle.manifest import Bundle
from support import herds

TEXT = "The herd grazes where the grass is greenest, and every calf follows its own mother. " * 20


def _choice(name: str, losses: tuple[float, ...], sizes: tuple[float, ...]) -> Choice:
    return Choice(Part(name, (name,), {}), losses, sizes)


@pytest.mark.parametrize("room", [0, 1, 3, 8, 9])
def test_equal_costs_go_to_the_best_of_all_choices(room: int) -> None:
    """Against every subset there is."""
    saved = np.random.default_rng(room).uniform(size=8)
    found = allocate([_choice(str(index), (value, 0.0), (0.0, 1.0)) for index, value in enumerate(saved)], room)
    best = max((saved[list(some)].sum(), some) for count in range(min(room, 8) + 1)
               for some in combinations(range(8), count))
    assert [index for index, which in enumerate(found) if which] == list(best[1])


@pytest.mark.parametrize("room", range(0, 19, 3))
def test_of_several_formats_no_exchange_saves_more(room: int) -> None:
    """Losses that fall by four with every bit: nothing that fits is better."""
    losses = np.random.default_rng(room).uniform(size=4)
    choices = [_choice(str(index), tuple(loss / 4.0**which for which in range(3)), (0.0, 1.0, 2.0))
               for index, loss in enumerate(losses)]
    found = allocate(choices, room)
    assert sum(found) == min(room, 8)
    best = min(sum(choices[index].losses[which] for index, which in enumerate(some))
               for some in product(range(3), repeat=4) if sum(some) <= room)
    assert sum(choices[index].losses[which] for index, which in enumerate(found)) == pytest.approx(best)


def test_a_format_that_is_worse_for_its_size_is_passed_over() -> None:
    """The middle one saves little for its bytes: from the first to the last at once, or not at all."""
    part = _choice("part", (8.0, 7.5, 1.0), (0.0, 5.0, 6.0))
    assert [step[2] for step in part.steps()] == [2]
    assert allocate([part], 5) == [0]
    assert allocate([part], 6) == [2]


def test_no_more_is_spent_than_there_is() -> None:
    cheap, dear = _choice("cheap", (1.0, 0.0), (0.0, 3.0)), _choice("dear", (5.0, 0.0), (0.0, 10.0))
    assert allocate([cheap, dear], 9) == [1, 0]
    assert allocate([cheap, dear], 13) == [1, 1]


def test_a_step_that_did_not_come_ends_its_part() -> None:
    """A later, smaller step would begin where the part is not."""
    part = _choice("part", (9.0, 1.0, 0.9), (0.0, 4.0, 5.0))
    assert allocate([part], 3) == [0]


def test_every_matrix_of_the_decoder_has_one_part() -> None:
    parts = parts_of(TINY)
    names = [name for part in parts for name in part.tensors]
    assert len(names) == len(set(names))
    assert "layers.0.self_attn.k_proj.weight" in names
    assert "layers.1.feed_forward.experts.down_proj" in names
    assert not any("router" in name or "norm" in name or "vision" in name or "embed" in name for name in names)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    checkpoint, calibration = (tmp_path_factory.mktemp("bits") / name for name in ("checkpoint", "calibration"))
    herds.save(TINY, checkpoint)
    herds.write_processor(checkpoint)
    with open_checkpoint(checkpoint) as source:
        data = data_of(source, [Record("text", "text", document=(TEXT,))], most_tokens=1000, held_out=0)
        calibrate(source, calibration, data)
    return checkpoint, calibration


def test_a_bundle_has_the_size_that_was_asked_for(measured: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, calibration = measured
    with open_checkpoint(checkpoint) as source:
        request = {"recipe": "int4", "calibration": calibration}
        with pytest.raises(HerdError, match=r"--bits 1 cannot be met: .* this model has (\d+\.\d\d) bits") as refused:
            plan_build(source, tmp_path / "bundle", bits=1, **request)  # type: ignore[arg-type]
        least = float(str(refused.value).split("this model has ")[1].split()[0])
        small, large = (plan_build(source, tmp_path / "bundle", bits=bits, **request)  # type: ignore[arg-type]
                        for bits in (least, least + 0.5))
        parameters = model_size(source.config).total
        assert set(small.job.bits.values()) == {4}
        assert len(set(large.job.bits.values()) & {5, 6, 8}) > 0
        assert set(large.job.bits.values()) <= {4, 5, 6, 8}
        assert small.memory.bundle_bytes * 8 / parameters <= least
        assert least + 0.2 < large.memory.bundle_bytes * 8 / parameters <= least + 0.5
        bundle = build_bundle(source, tmp_path / "bundle", bits=least + 0.5, **request)
        assert Bundle.open(bundle.directory).manifest.bits == large.job.bits


def test_what_bits_need(measured: tuple[Path, Path], tmp_path: Path) -> None:
    with open_checkpoint(measured[0]) as source:
        for recipe, calibration, message in (("int8", measured[1], "goes with --recipe int4, not with int8"),
                                             ("int4", None, "pass --calibration")):
            with pytest.raises(HerdError, match=message):
                plan_build(source, tmp_path / "bundle", recipe=recipe, calibration=calibration, bits=6)


def test_bits_go_where_most_of_the_residual_stream_is_made(measured: tuple[Path, Path], tmp_path: Path) -> None:
    """Of two layers alike in everything else; a calibration that does not say how much is refused."""
    checkpoint, calibration = measured
    with open_checkpoint(checkpoint) as source:
        plain = with_shares(calibration, tmp_path / "plain", {})
        altered = with_shares(calibration, tmp_path / "altered", {
            "layers.1.feed_forward": torch.tensor(1e-3), "layers.3.feed_forward": torch.tensor(0.9)})
        before, after = (
            plan_build(source, tmp_path / "bundle", recipe="int4", calibration=path, bits=8).job.bits
            for path in (plain, altered))
        parts = [part for part in before if part.startswith("layers.1.feed_forward")]
        assert len(parts) == 2
        for low in parts:
            high = low.replace("layers.1", "layers.3")
            assert after[low] == 4 < before[low]
            assert after[high] > after[low]
        silent = with_shares(calibration, tmp_path / "silent", {"layers.2.self_attn": None})
        with pytest.raises(HerdError, match=r"does not say what layers\.2\.self_attn adds to .*: write"):
            plan_build(source, tmp_path / "bundle", recipe="int4", calibration=silent, bits=8)


def with_shares(calibration: Path, path: Path, shares: dict[str, torch.Tensor | None]) -> Path:
    """A copy of a calibration that says other shares of the residual stream, or does not say them."""
    shutil.copytree(calibration, path)
    scales = load_file(path / SCALES)
    for sublayer, share in shares.items():
        del scales[f"{RESIDUAL_SHARE}/{sublayer}"]
        if share is not None:
            scales[f"{RESIDUAL_SHARE}/{sublayer}"] = share
    write_tensors(scales, path / SCALES)
    return path


def test_a_tied_head_gets_bits_as_well(tmp_path: Path) -> None:
    """It is the largest part of a small model; the size is kept, and the logits are the model's, over ranks too."""
    tied = replace(TINY, text=replace(TINY.text, tie_word_embeddings=True))
    checkpoint, calibration = tmp_path / "checkpoint", tmp_path / "calibration"
    herds.save(tied, checkpoint)
    herds.write_processor(checkpoint)
    with open_checkpoint(checkpoint) as source:
        data = data_of(source, [Record("text", "text", document=(TEXT,))], most_tokens=1000, held_out=0)
        calibrate(source, calibration, data)
        request: dict[str, Any] = {"recipe": "int4", "calibration": calibration}
        with pytest.raises(HerdError) as refused:
            plan_build(source, tmp_path / "bundle", bits=1, **request)
        least = float(str(refused.value).split("this model has ")[1].split()[0])
        assert plan_build(source, tmp_path / "bundle", bits=least, **request).job.bits["lm_head"] == 4
        planned = plan_build(source, tmp_path / "bundle", bits=least + 1.5, **request)
        build_bundle(source, tmp_path / "bundle", bits=least + 1.5, **request)
        assert planned.job.bits["lm_head"] in (5, 6, 8)
        assert planned.memory.bundle_bytes * 8 / model_size(source.config).total <= least + 1.5
        build_bundle(source, tmp_path / "ranks", bits=least + 1.5, shards=ShardPlan.parse("tp=2"), **request)
        build_bundle(source, tmp_path / "exact", recipe="fp32")
    found, ranks, exact = (_logits(tmp_path / name) for name in ("bundle", "ranks", "exact"))
    assert np.corrcoef(found, exact)[0, 1] > 0.97
    assert np.corrcoef(ranks, exact)[0, 1] > 0.97


def _logits(bundle: Path) -> np.ndarray:
    with Engine.load(bundle, threads=1) as engine:
        return engine.prefill(engine.new_sequence(), herds.tokens(30, seed=5))
