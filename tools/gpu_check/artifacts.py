"""What is made before a GPU is there: tiny bundles for every target that is checked, and what a CPU says of them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERDS = "herds"
_DONE = "complete.json"
RANKS = "ranks"
"""The model that is split over two ranks; of its bundles the first part of a name is the target's, too."""
_REFERENCE = "cpu-fp32"
PROMPT, TOKENS = 41, 64
"""Of the tiny models' text: over two of their chunks of 16 tokens, and with a third."""


def target_for(device: str) -> str:
    """The target whose bundles a device runs."""
    return "cpu" if device == "cpu" else "cuda"


def make_artifacts(folder: Path) -> None:
    """Make them, unless they are there already, for all targets of this version."""
    wanted = {name: _bundles(name) for name, _ in _configs()}
    done = folder / _DONE
    if done.exists() and json.loads(done.read_text(encoding="utf-8")) == wanted:
        return
    shutil.rmtree(folder / HERDS, ignore_errors=True)
    for name, config in _configs():
        _herd(folder / HERDS / name, config)
    done.write_text(json.dumps(wanted, indent=1), encoding="utf-8")


def remove_references(folder: Path) -> None:
    """Remove the bundles for CPUs, of which only what they said is needed elsewhere."""
    for bundle in folder.glob(f"{HERDS}/*/{_REFERENCE}*"):
        shutil.rmtree(bundle)


def _bundles(model: str) -> list[str]:
    """Target, recipe and shards of every bundle of a model."""
    from herdgraph.export.targets.precision import PRECISIONS

    if model == RANKS:
        return [_REFERENCE, f"{_REFERENCE}-tp=2", "cuda-bf16-tp=2"]
    return [_REFERENCE, *(f"cuda-{recipe}" for recipe in PRECISIONS["cuda"].recipes)]


def _configs() -> Iterator[tuple[str, Any]]:
    """Tiny models in shapes that CUDA's operators take: heads of 64, widths of multiples of 64, groups of five."""
    from dataclasses import replace

    from herdgraph.model.config import HerdConfig
    from herdgraph.model.config.presets import TINY

    text = replace(TINY.text, hidden_size=128, num_heads=5, num_kv_heads=1, head_dim=64, expert_size=128,
                   dense_size=256)
    yield "text", HerdConfig(text=replace(text, moe_layers=tuple(range(text.num_layers))))
    yield "images", replace(TINY, text=text)
    yield RANKS, HerdConfig(text=replace(text, num_heads=4, num_kv_heads=2))


def _herd(folder: Path, config: Any) -> None:
    """A checkpoint, its bundles, and the logits of one text."""
    from herdgraph.export.pipeline import build_bundle
    from herdgraph.model.checkpoint import open_checkpoint
    from herdgraph.model.config.shard_plan import ShardPlan

    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as directory:
        _checkpoint(config, Path(directory) / "model")
        with open_checkpoint(Path(directory) / "model") as checkpoint:
            for name in _bundles(folder.name):
                target, recipe, *shards = name.split("-")
                build_bundle(checkpoint, folder / name, target=target, recipe=recipe,
                             shards=ShardPlan.parse(shards[0]) if shards else None)
    _expect(folder, config)


def _checkpoint(config: Any, directory: Path) -> None:
    """Seeded weights that give logits of order one, in Hugging Face's layout."""
    import torch

    from herdgraph.model.checkpoint import save_checkpoint
    from herdgraph.model.config.names import expected_tensors

    generator = torch.Generator().manual_seed(0)

    def weight(name: str, shape: tuple[int, ...]) -> Any:
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return 0.1 * noise + (0.0 if "bias" in name or "class_embedding" in name else 1.0)
        fan_in = shape[1] if ".experts." in name else shape[-1]
        return noise * (1.0 if "embed_tokens" in name else fan_in**-0.5)

    shapes = expected_tensors(config).items()
    save_checkpoint(directory, config, ((name, weight(name, shape)) for name, shape in shapes))


def _expect(folder: Path, config: Any) -> None:
    """What the bundle for CPUs says of a random text, in float32, with a random picture in it where the model sees."""
    from herdgraph import Engine

    generator, vision = np.random.default_rng(0), config.vision
    ids = generator.integers(3, config.text.vocab_size - 30, TOKENS)
    pixels = np.zeros((0,), np.float32)
    if vision:
        ids[5 : 5 + vision.tokens_per_tile] = config.image_token_id
        pixels = generator.standard_normal((1, 3, vision.image_size, vision.image_size)).astype(np.float32)
    with Engine.load(folder / _REFERENCE, threads=1) as engine:
        seen = pixels if len(pixels) else None
        logits = engine.prefill(engine.new_sequence(), ids.tolist(), seen, all_positions=True)
    np.savez_compressed(folder / "expected.npz", ids=ids, prompt=PROMPT, pixels=pixels, logits=np.asarray(logits))
