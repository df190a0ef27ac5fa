"""Torch modules and CPU bundles against transformers' Llama 4, with every odd part switched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.model import Llama4
from herdgraph.runtimes import Engine
from support import herds

BOUND = 1e-4
LAYERS = ("moe_layers", "rope_layers", "chunked_layers")
DEEP = "moe-every-second-layer"
TOKENS = 70  # more than four chunks of 16, far beyond the temperature floor of 8


def _build(directory: Path, target: str = "cpu") -> Engine:
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        build_bundle(checkpoint, directory / target, target=target)
    return Engine.load(directory / target, threads=1)


def _shallow(name: str) -> HerdConfig:
    """A variant with two layers, unless its layers are what it is about."""
    config = herds.VARIANTS[name]
    alike = all(getattr(config.text, field) == getattr(TINY.text, field) for field in LAYERS)
    return replace(config, text=replace(config.text, **herds.TWO_LAYERS)) if alike and name != DEEP else config


@pytest.mark.parametrize("name", herds.VARIANTS)
def test_text_matches_transformers(name: str, tmp_path: Path) -> None:
    config = _shallow(name)
    model, ids = herds.save(config, tmp_path / "checkpoint"), herds.tokens(TOKENS)
    expected = herds.logits(model, ids)
    assert 0.3 < expected.std() < 3, "logits of order one are what the bound is for"

    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        assert checkpoint.config == config
        ours = Llama4.from_checkpoint(checkpoint)
    with torch.inference_mode():
        torch.testing.assert_close(ours(torch.tensor([ids]))[0], expected, atol=BOUND, rtol=0)

    engine = _build(tmp_path)
    sequence, split = engine.new_sequence(), TOKENS - 20
    found = [*engine.prefill(sequence, ids[:split], all_positions=True)]
    found += [engine.decode(sequence, token) for token in ids[split:]]
    np.testing.assert_allclose(np.stack(found), expected, atol=BOUND, rtol=0)

    one_by_one = engine.new_sequence()
    for position, token in enumerate(ids[:40]):
        np.testing.assert_allclose(engine.decode(one_by_one, token), expected[position], atol=BOUND, rtol=0)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Engine, Llama4]:
    directory = tmp_path_factory.mktemp("multimodal")
    model = herds.save(TINY, directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        ours = Llama4.from_checkpoint(checkpoint)
    return model, _build(directory), ours


# Tiles per image; each tile fills four positions, separators are ordinary tokens.
@pytest.mark.parametrize("images", [(1,), (5,), (1, 1), (3, 1, 2)], ids=str)
def test_images_match_transformers(images: tuple[int, ...], multimodal: tuple[torch.nn.Module, Engine, Llama4]) -> None:
    model, engine, ours = multimodal
    ids: list[int] = []
    for tiles in images:
        ids += herds.tokens(3, seed=tiles)
        for _ in range(tiles):
            ids += [TINY.image_token_id] * 4 + [501]
    ids += herds.tokens(20)
    pixels = torch.randn(sum(images), 3, 28, 28)
    expected = herds.logits(model, ids, pixels)
    with torch.inference_mode():
        torch.testing.assert_close(ours(torch.tensor([ids]), pixels)[0], expected, atol=BOUND, rtol=0)
    sequence = engine.new_sequence()
    found = [*engine.prefill(sequence, ids[:-5], pixels.numpy(), all_positions=True)]
    found += [engine.decode(sequence, token) for token in ids[-5:]]
    np.testing.assert_allclose(np.stack(found), expected, atol=BOUND, rtol=0)


def test_pictures_matter(multimodal: tuple[torch.nn.Module, Engine, Llama4]) -> None:
    _, engine, _ = multimodal
    ids = [TINY.image_token_id] * 4 + herds.tokens(4)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 28, 28)).astype(np.float32)
    one, other = (engine.prefill(engine.new_sequence(), ids, pixels[i : i + 1]) for i in (0, 1))
    assert np.abs(one - other).max() > 0.1


def test_unlowered_graph_is_the_same_function(tmp_path: Path) -> None:
    model = herds.save(TINY, tmp_path / "checkpoint")
    canonical = _build(tmp_path, "canonical")
    ids = herds.tokens(5) + [TINY.image_token_id] * 4 + herds.tokens(40)
    pixels = torch.randn(1, 3, 28, 28)
    expected = herds.logits(model, ids, pixels)
    found = canonical.prefill(canonical.new_sequence(), ids, pixels.numpy(), all_positions=True)
    np.testing.assert_allclose(found, expected, atol=BOUND, rtol=0)
