"""The rotated checkpoint is the same function, and nothing stands out in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.checkpoint.rotated import RotatedCheckpoint, Rotation, hadamard
from herdgraph.model.config.names import expected_tensors
from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.model import Llama4
from support import herds


@pytest.mark.parametrize("width", [1, 2, 9, 48, 64, 576, 1024, 5120])
def test_rotations_are_orthogonal(width: int) -> None:
    rotation = Rotation(width)
    matrix = rotation(torch.eye(width))
    rows = torch.randperm(width)[:1024]  # of the widest one only a part, against all its rows
    torch.testing.assert_close(matrix[rows] @ matrix.T, torch.eye(width)[rows], atol=2e-5, rtol=0)
    x = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation(x), x @ matrix, atol=1e-4, rtol=1e-4)


def test_hadamard() -> None:
    assert (hadamard(64).abs() == 1 / 8).all()
    torch.testing.assert_close(hadamard(64) @ hadamard(64), torch.eye(64))


def test_rotation_spreads_outlier() -> None:
    x = torch.zeros(1, 1024)
    x[0, 7] = 32.0
    assert Rotation(1024)(x).abs().max() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["moe-every-second-layer", "tied", "top-2", "gqa-5", "vision"])
def test_rotation_keeps_logits(name: str, tmp_path: Path) -> None:
    config = TINY if name == "vision" else herds.VARIANTS[name]
    herds.save(config, tmp_path / "checkpoint")
    ids = herds.tokens(20) if name != "vision" else [*herds.tokens(6), *[500] * 4, *herds.tokens(10)]
    pixels = torch.randn(1, 3, 28, 28) if name == "vision" else None
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        rotated = RotatedCheckpoint(checkpoint)
        models = [Llama4.from_checkpoint(source).eval() for source in (checkpoint, rotated)]
        assert set(expected_tensors(rotated.config)) >= set(expected_tensors(config))
        assert not torch.equal(rotated.read("embed_tokens.weight"), checkpoint.read("embed_tokens.weight"))
    with torch.inference_mode():
        plain, turned = (model(torch.tensor([ids]), pixels) for model in models)
    assert (plain - turned).abs().max() < 1e-4


def test_values_that_stand_out_are_spread_over_their_head(tmp_path: Path) -> None:
    """A channel of the values a hundred times larger: neither what is cached nor what the output reads shows it."""
    herds.save(replace(TINY, vision=None), tmp_path / "checkpoint")
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        values = checkpoint.read("layers.0.self_attn.v_proj.weight").float()
        values[5] = 100 * values.abs().mean()
        output = checkpoint.read("layers.0.self_attn.o_proj.weight").float()
        output[:, 5] = 100 * output.abs().mean()
        rotated = RotatedCheckpoint(checkpoint)
        for weight in (values.T, output):
            heads = rotated.rotate_heads(weight).abs().mean(0)
            assert heads.max() < 2 * heads[:16].mean(), "all 16 channels of the head share it"
            assert heads[16:].max() < 2 * weight.abs().mean(0)[16:].max(), "no other head does"


@pytest.mark.parametrize("name", ["layers.0.self_attn.o_proj.weight", "layers.1.feed_forward.experts.gate_up_proj",
                                  "embed_tokens.weight",
                                  "layers.2.self_attn.v_proj.weight", "layers.0.feed_forward.down_proj.weight"])
def test_read_slices(name: str, tmp_path: Path) -> None:
    herds.save(replace(TINY, vision=None), tmp_path / "checkpoint")
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        rotated = RotatedCheckpoint(checkpoint)
        whole = rotated.read(name)
        torch.testing.assert_close(rotated.read(name, slice(1, 3)), whole[1:3])
        torch.testing.assert_close(rotated.read(name, 2), whole[2])
