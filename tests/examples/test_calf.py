"""The model that herdgraph carries: small, whole, and it sees the same as its torch original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.calf import CALF, PICTURES
from herdgraph.export.pipeline import build_bundle
from herdgraph.files import size
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.processing import PromptProcessor
from herdgraph.runtimes import Engine

LARGEST = 16 << 20


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    bundle = tmp_path_factory.mktemp("calf") / "bundle"
    with open_checkpoint("calf") as checkpoint:
        build_bundle(checkpoint, bundle)
    return Engine.load(bundle, threads=1)


def _messages(picture: Path) -> list[dict]:
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "What is this?"}]
    return [{"role": "user", "content": content}]


def test_it_is_small_enough_to_be_carried() -> None:
    total = sum(path.stat().st_size for path in CALF.iterdir())
    assert total < LARGEST, size(total)


def test_a_directory_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_checkpoint("calf") as checkpoint:
        assert checkpoint.directory == CALF
    (tmp_path / "calf").mkdir()
    with pytest.raises(Exception, match="calf holds neither"):
        open_checkpoint("calf")


@torch.no_grad()
def test_the_bundle_says_what_the_torch_model_says(engine: Engine) -> None:
    with open_checkpoint("calf") as checkpoint:
        model = Llama4.from_checkpoint(checkpoint).eval()
    processor = PromptProcessor(CALF, model.config)
    pictures = sorted(PICTURES.glob("*.png"))
    assert pictures
    for picture in pictures:
        prepared = processor.prepare(_messages(picture))
        ids = list(prepared.token_ids)
        while len(ids) < len(prepared.token_ids) + 24:
            token = int(model(torch.tensor([ids]), torch.from_numpy(prepared.pixel_values))[0, -1].argmax())
            if token in processor.tokenizer.stop_ids:
                break
            ids.append(token)
        said = processor.tokenizer.decode(ids[len(prepared.token_ids) :])
        assert engine.generate(_messages(picture), max_new_tokens=24).text == said


def test_it_names_pictures_that_it_was_not_trained_on(engine: Engine) -> None:
    shown = {picture.stem: engine.generate(_messages(picture), max_new_tokens=24).text
             for picture in PICTURES.glob("*.png")}
    named = [name for name, said in shown.items() if name.split(", ")[0].lower() in said.lower()]
    assert len(named) >= len(shown) / 3, shown
