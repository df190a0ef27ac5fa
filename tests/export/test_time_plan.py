"""The time of a build, guessed before it: every format has a rate, and Hessians are scaled by what they really take."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from herdgraph.export import time_plan
from herdgraph.export.pipeline import plan_build
from herdgraph.export.time_plan import CAPTURE_SECONDS
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.names import expected_tensors
from herdgraph.model.config.presets import TINY
from herdgraph.model.quantization.formats import BlockFormat, ChannelFormat, Format, Fp8Format
from herdgraph.model.quantization.recipes import RECIPES
from support import herds


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("time") / "checkpoint"
    herds.save(replace(TINY, vision=None), found)
    return found


@pytest.mark.parametrize(("target", "recipe"), [
    ("cpu", "fp32"), ("cpu", "int8"), ("cpu", "int4"), ("cpu-stock", "int8"), ("cpu-stock", "int4"), ("cuda", "bf16"),
])
def test_every_recipe_has_a_time(target: str, recipe: str, checkpoint: Path, tmp_path: Path) -> None:
    with open_checkpoint(checkpoint) as source:
        seconds = plan_build(source, tmp_path / "out", target=target, recipe=recipe).expected_seconds()
    assert CAPTURE_SECONDS < seconds < CAPTURE_SECONDS + 60
    assert not list(tmp_path.iterdir()), "a sample is written and removed"


def test_hessians_are_scaled_to_their_sizes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor takes K^3, an element a + b K, in 8 bits less than in 4."""
    bits = {BlockFormat(4, 32): 1.0, ChannelFormat(): 0.5}
    monkeypatch.setattr(time_plan, "_hessian_seconds", lambda inputs, layout: (
        1e-9 * inputs**3, bits[layout] * (1e-7 + 1e-9 * inputs)))
    with open_checkpoint(checkpoint) as source:
        job = plan_build(source, tmp_path / "out", recipe="int4").job
    wanted = 0.0
    for name, shape in expected_tensors(job.config).items():
        layout = RECIPES["int4"].layout_of_tensor(name, shape)
        if layout is not None and name != "embed_tokens.weight":
            inputs, count = shape[1], shape[0] if ".experts." in name else 1
            wanted += count * 1e-9 * inputs**3 + math.prod(shape) * bits[layout] * (1e-7 + 1e-9 * inputs)
    assert time_plan._by_hessians(job) == pytest.approx(wanted)
    assert wanted > 0


@pytest.mark.parametrize("layout", [BlockFormat(4, 32), BlockFormat(4, 128), ChannelFormat(), Fp8Format()])
def test_every_format_is_rounded_by_hessians_at_a_rate(layout: Format) -> None:
    factor, element = time_plan._hessian_seconds(100, layout)
    assert 0 < factor < 10
    assert 0 < element < 1e-3


def test_an_output_that_cannot_be_written_has_a_time(checkpoint: Path) -> None:
    with open_checkpoint(checkpoint) as source:
        assert plan_build(source, Path("/proc/none/out")).expected_seconds() > 0
