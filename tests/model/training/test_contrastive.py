"""Aligning an image tower: the loss by its definition, and pictures that find their names after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from herdgraph.cli.train import train
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.training.contrastive import contrastive_loss
from support import herds

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}


def test_the_loss_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 5, generator=generator)
    names = [0, 1, 0, 2, 3]
    like = torch.tensor([[a == b for b in names] for a in names])
    by_hand = 0.0
    for one in (logits, logits.T):
        for row in range(5):
            chances = one[row].softmax(-1)
            by_hand -= float(torch.log(sum(chances[column] for column in range(5) if names[column] == names[row]))) / 10
    loss, found = contrastive_loss(logits, like)
    assert float(loss) == pytest.approx(by_hand, rel=1e-5)
    best = logits.argmax(1).tolist()
    assert found == pytest.approx(sum(names[b] == names[row] for row, b in enumerate(best)) / 5)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    herds.save(TINY, tmp_path / "checkpoint")
    herds.write_processor(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def _pairs(directory: Path) -> Path:
    side = TINY.vision.image_size
    rows = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (side, side), colour).save(directory / f"{name}.png")
        rows += [{"content": [{"image": f"{name}.png"}, name]}] * 4
    (directory / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory / "pairs.jsonl"


def test_pictures_find_their_names_and_the_decoder_stays(checkpoint: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(train, [
        "align", "--checkpoint", str(checkpoint), "--data", str(_pairs(tmp_path)), "--output", str(tmp_path / "run"),
        "--rows", "4", "--seq-len", "64", "--held-out", "0", "--train.steps", "40", "--train.log-every", "1",
        "--optimizer.warmup", "2",
        "--optimizer.learning-rate", "3e-3", "--optimizer.weight-decay", "0", "--experts.bias-rate", "0"])
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["found"] < 0.9
    assert records[-1]["found"] > 0.95
    with open_checkpoint(checkpoint) as before, open_checkpoint(tmp_path / "run" / "model") as after:
        for name, moves in (("layers.1.self_attn.q_proj.weight", False),
                            ("multi_modal_projector.linear_1.weight", True)):
            assert torch.equal(before.read(name).bfloat16(), after.read(name)) is not moves


@pytest.mark.parametrize(("rows", "message"), [
    ([{"text": "no picture at all"}] * 4, "the batch has 0 pairs of one picture and a text"),
])
def test_data_without_pairs_is_refused(checkpoint: Path, tmp_path: Path, rows: list[dict], message: str) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = CliRunner().invoke(train, ["align", "--checkpoint", str(checkpoint), "--data", str(tmp_path / "data.jsonl"),
                                      "--output", str(tmp_path / "run"), "--rows", "1", "--seq-len", "64",
                                      "--held-out", "0"])
    assert done.exit_code == 1
    assert message in done.output


def test_a_model_without_tower_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    herds.save(replace(TINY, vision=None), tmp_path / "text")
    herds.write_processor(tmp_path / "text")
    done = CliRunner().invoke(train, ["align", "--checkpoint", str(tmp_path / "text"), "--data", "x",
                                      "--output", str(tmp_path / "r")])
    assert done.exit_code == 1
    assert "without an image tower" in done.output
