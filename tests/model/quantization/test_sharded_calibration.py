"""A calibration as a rank asks for it: layers and experts counted from its own first, inputs of its own slice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.model.quantization.calibration_file import HESSIANS, INPUT_ENERGY, KV_AMAX, SCALES, CalibrationFile
from herdgraph.model.quantization.sharded_calibration import RankCalibration

EXPERTS = "layers.3.feed_forward.experts"
O_PROJ = "layers.3.self_attn.o_proj.weight"
PLAN, RANK = ShardPlan(2, 2, 2), 7
"""Rank 7: the last of stage 1, experts 2 and 3, the second half of each, the last of four heads."""


@pytest.fixture
def whole(tmp_path: Path) -> CalibrationFile:
    scales = {f"max/layers.{layer}.self_attn.{KV_AMAX}": torch.tensor([layer, 10.0 + layer]) for layer in range(4)}
    scales |= {f"max/{EXPERTS}.down_proj": torch.arange(4.0), f"max/{O_PROJ}": torch.tensor(5.0),
               f"{INPUT_ENERGY}/{O_PROJ}": torch.arange(64.0)}
    save_file(scales, tmp_path / SCALES)
    (tmp_path / HESSIANS).mkdir()
    save_file({f"{EXPERTS}.down_proj": torch.arange(4 * 48 * 48.0).view(4, 48, 48),
               f"{EXPERTS}.gate_up_proj": torch.arange(4 * 64 * 64.0).view(4, 64, 64)},
              tmp_path / HESSIANS / "layers.3.safetensors")
    return CalibrationFile(tmp_path, {}, "max")


def test_layers_are_counted_from_the_stages_first(whole: CalibrationFile) -> None:
    part = RankCalibration.of(whole, PLAN, TINY, RANK)
    assert part.required_kv_amax(1) == whole.required_kv_amax(3) == (3, 13)
    assert RankCalibration.of(whole, PLAN, TINY, 0).required_kv_amax(1) == (1, 11)


def test_experts_are_the_ranks_own(whole: CalibrationFile) -> None:
    part = RankCalibration.of(whole, PLAN, TINY, RANK)
    assert part.input_amax(f"{EXPERTS}.down_proj").tolist() == [2, 3]
    assert part.input_amax(O_PROJ) == 5


def test_inputs_are_the_ranks_own(whole: CalibrationFile) -> None:
    part = RankCalibration.of(whole, PLAN, TINY, RANK)
    outliers = part.outliers(O_PROJ)
    assert outliers is not None
    assert outliers.tolist() == [14, 15], "the largest of its own sixteen, counted from its first"
    down, gate_up = (part.hessian(f"{EXPERTS}.{role}", 1) for role in ("down_proj", "gate_up_proj"))
    every_down, every_gate_up = (whole.hessian(f"{EXPERTS}.{role}") for role in ("down_proj", "gate_up_proj"))
    assert down is not None
    assert every_down is not None
    assert torch.equal(down, every_down[3, 24:, 24:])
    assert gate_up is not None
    assert every_gate_up is not None
    assert torch.equal(gate_up, every_gate_up[3]), "the residual stream is not split"
    assert part.hessian("layers.3.self_attn.q_proj.weight") is None
