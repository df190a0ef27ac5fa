"""Bundles for cpu: which operators are left, how near integers stay, caches in fewer bits without calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from herdgraph.export.cache_type import cache_type
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.verify import fidelity
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.quantization.recipes import RECIPES
from herdgraph.runtimes import Engine
from herdgraph.runtimes.bundle.manifest import Bundle
from herdgraph.runtimes.executors.options import ExecutorOptions
from herdgraph.runtimes.executors.ort.load import load_vision
from herdgraph.runtimes.executors.ort.weights import KEY
from support import graphs, herds

Build = Callable[[str, str], Path]
IDS = [*herds.tokens(6), *[500] * 4, *herds.tokens(40)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    directory = tmp_path_factory.mktemp("native") / "checkpoint"
    return herds.save(TINY, directory), directory


@pytest.fixture(scope="module")
def build(checkpoint: tuple[torch.nn.Module, Path]) -> Build:
    @cache
    def built(recipe: str, caches: str = "float") -> Path:
        output = checkpoint[1].parent / f"{recipe}-{caches}"
        with open_checkpoint(checkpoint[1]) as source:
            build_bundle(source, output, recipe=replace(RECIPES[recipe], caches=caches))  # type: ignore[arg-type]
        return output

    return built


def _logits(bundle: Path) -> np.ndarray:
    pixels = np.random.default_rng(0).normal(size=(1, 3, 28, 28)).astype(np.float32)
    engine = Engine.load(bundle, threads=1)
    return engine.prefill(engine.new_sequence(), IDS, pixels, all_positions=True)


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4"])
def test_four_operators_per_layer(build: Build, recipe: str) -> None:
    """Attention between two products, and the feed-forward; with the head that is all that multiplies."""
    model = ir.load(build(recipe, "float") / "decoder.onnx")
    found = graphs.operators(model)
    assert (found["Project"], found["PagedAttention"], found["Mixture"]) == (2 * 4 + 1, 4, 4)
    assert not {"MatMul", "MatMulNBits", "MatMulIntegerToFloat", "RMSNormalization", "If"} & set(found)
    packed = {name for name, value in model.graph.initializers.items() if value.dtype == ir.DataType.UINT8}
    assert packed == {value.name for value in model.graph.inputs if str(value.name).endswith(".codes")}
    assert KEY in model.metadata_props


@pytest.mark.parametrize(("recipe", "bound"), [("fp32", 1e-5), ("int8", 3e-2)])
def test_the_image_tower_has_five_operators_per_layer(
    build: Build, checkpoint: tuple[torch.nn.Module, Path], recipe: str, bound: float,
) -> None:
    """Attention between two products, two products after it; features stay near those of the modules."""
    found = graphs.operators(ir.load(build(recipe, "float") / "vision.onnx"))
    assert (found["Project"], found["FullAttention"]) == (4 * 2 + 4, 2)
    assert not {"MatMul", "MatMulNBits", "Attention", "Gelu", "RotaryEmbedding", "Split"} & set(found)
    pixels = np.random.default_rng(0).normal(size=(3, 3, 28, 28)).astype(np.float32)
    vision = load_vision(Bundle.open(build(recipe, "float"), verify=False), ExecutorOptions(1))
    assert vision is not None
    with torch.no_grad():
        hidden = checkpoint[0].vision_model(pixel_values=torch.from_numpy(pixels)).last_hidden_state
        wanted = checkpoint[0].multi_modal_projector(hidden).flatten(0, -2).numpy()
    difference = np.linalg.norm(vision.features(pixels), axis=-1) - np.linalg.norm(wanted, axis=-1)
    assert np.abs(difference).max() < bound * np.linalg.norm(wanted, axis=-1).max()


@pytest.mark.parametrize(("recipe", "bound"), [("int8", 2e-2), ("int4", 0.2)])
def test_integers_stay_close(build: Build, recipe: str, bound: float) -> None:
    report = fidelity(_logits(build("fp32", "float")), _logits(build(recipe, "float")))
    # A random router decides narrowly: a token that goes to another expert is far off, the others are close.
    assert 0 < report.mean_kl < bound
    if recipe == "int8":
        assert report.mean_difference < 0.1 * report.logit_std
        assert report.top1_agreement > 0.85


@pytest.mark.parametrize(("caches", "bound"), [("float16", 1e-6), ("int8", 5e-3)])
def test_caches_in_fewer_bits_need_no_calibration(build: Build, caches: str, bound: float) -> None:
    exact, bundle = build("fp32", "float"), build("fp32", caches)
    report = fidelity(_logits(exact), _logits(bundle))
    assert 0 < report.mean_kl < bound
    assert report.top1_agreement > 0.9
    sizes = [Engine.load(path, threads=1).new_sequence().cache.element_bytes for path in (exact, bundle)]
    assert sizes == [4, {"float16": 2, "int8": 1 + 4 / 16}[caches]], "heads of 16 share a scale in float32"


def test_a_bundle_says_how_it_stores_keys_and_values(build: Build) -> None:
    for caches, name in (("float", "float32"), ("float16", "float16"), ("int8", "int8")):
        bundle = Bundle.open(build("fp32", caches), verify=False)
        assert cache_type(bundle) == name
        assert ir.load(bundle.graph("decoder")).metadata_props["herdgraph.cache_type"] == caches
