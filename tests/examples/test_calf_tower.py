"""The calf's tower in training: it learns colours, and goes on where it was cut off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.calf import tower
from examples.calf.config import IMAGE_SIZE, calf_config
from examples.calf.lite0 import GRID, POOLED, Lite0
from examples.calf.meanings import WIDTH
from examples.calf.pictures_data import NamedPictures
from examples.calf.tokenizer import save_processor, train_tokenizer
from examples.calf.tower import TowerOptions, TowerRun, train_tower
from herdgraph.model.llama4.initialization import initialize
from herdgraph.model.llama4.model import Llama4

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}
VOCABULARY = 320


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save_processor(tmp_path / "files", train_tokenizer([" red green blue white"], VOCABULARY), image_size=IMAGE_SIZE)
    return tmp_path / "files"


def run_of(files: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, int]) -> TowerRun:
    """Pictures of one colour, and a teacher that sees it."""
    names = sorted(COLOURS)
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(tower.meanings, "meanings", lambda given: torch.eye(WIDTH)[: len(given)])
    pixels = torch.tensor([COLOURS[name] for name in names], dtype=torch.uint8)[:, None, None]
    seen = torch.randn(len(names), POOLED, generator=generator).half()
    pictures = NamedPictures(pixels.expand(-1, IMAGE_SIZE, IMAGE_SIZE, 3).contiguous(), torch.arange(len(names)), names,
                             seen[:, None, :GRID].expand(-1, 16, -1), seen)
    torch.manual_seed(1)
    model = initialize(Llama4(calf_config(VOCABULARY)))
    return TowerRun(model, pictures, files, TowerOptions(steps=steps, batch=8, learning_rates=(1e-3, 1e-3)))


def test_it_learns_to_see(files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = run_of(files, monkeypatch, steps=(25, 15))
    decoder = run.model.decoder.layers[0].self_attn.q_proj.weight.clone()
    first, steps = run.losses(), []
    train_tower(run, tmp_path / "run", lambda step, _: steps.append(step))
    last = run.losses()
    assert steps == list(range(1, 41))
    assert last["found"].item() > 0.7
    for part in ("names", "meanings", "places", "lite0"):
        assert last[part].item() < 0.8 * first[part].item(), part
    assert torch.equal(run.model.decoder.layers[0].self_attn.q_proj.weight, decoder)


def test_a_run_that_was_cut_off_goes_on(files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tower, "SAVE_EVERY", 2)

    def stop(step: int, _: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    whole, cut, again = (run_of(files, monkeypatch, steps=(3, 2)) for _ in range(3))
    train_tower(whole, tmp_path / "whole", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        train_tower(cut, tmp_path / "cut", stop)
    steps: list[int] = []
    train_tower(again, tmp_path / "cut", lambda step, _: steps.append(step))
    assert steps == [3, 4, 5]
    for trained in ("model", "heads"):
        found = getattr(again, trained).state_dict()
        for name, value in getattr(whole, trained).state_dict().items():
            assert torch.equal(value, found[name]), name


def test_the_second_round_reads_from_what_places_give(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one round trains of the meanings, the other leaves alone."""
    run = run_of(files, monkeypatch, steps=(2, 2))
    matrix, reader = run.heads.meaning.weight, next(run.heads.reader.parameters())
    for learns, rests in ((matrix, reader), (reader, matrix)):
        before, kept = learns.clone(), rests.clone()
        run.advance()
        run.advance()
        assert not torch.equal(learns, before)
        assert torch.equal(rests, kept)


def test_each_round_has_a_cosine_of_its_own() -> None:
    options = TowerOptions(steps=(100, 40), learning_rates=(1e-3, 5e-4))
    rates = [options.learning_rate(step) for step in range(140)]
    assert max(rates[:100]) == rates[4] == pytest.approx(1e-3)
    assert max(rates[100:]) == rates[101] == pytest.approx(5e-4)
    assert rates[99] < 1e-6
    assert rates[139] < 2e-6


def test_lite0_has_the_shapes_of_its_package() -> None:
    with torch.inference_mode():
        grid, pooled = Lite0().eval()(torch.rand(1, 3, 64, 64))
    assert (grid.shape, pooled.shape) == ((1, GRID, 4, 4), (1, POOLED))
    assert sum(parameter.numel() for parameter in Lite0().parameters()) == 4_652_008
