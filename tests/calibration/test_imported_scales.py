"""Calibrations made of the scales that a checkpoint carries, in the spellings of compressed-tensors and ModelOpt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from herdgraph.calibration.imported import import_scales
from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.verify import fidelity
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.quantization.calibration_file import CalibrationFile
from herdgraph.model.quantization.formats import Fp8Format
from herdgraph.model.quantization.recipes import RECIPES
from herdgraph.runtimes import Engine
from support import herds

Tensors = dict[str, torch.Tensor]
EXPERTS = "layers.1.feed_forward.experts"


@pytest.fixture(scope="module", params=["text", "images"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("full")
    herds.save(TINY if request.param == "images" else herds.variant(), directory)
    return directory


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().max() / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


def stored_name(tensors: Tensors, name: str) -> str:
    """How a checkpoint spells a canonical name: with a prefix when the model sees."""
    return next(found for found in tensors if found.endswith(name) and "vision" not in found)


def write(saved: Path, directory: Path, scales: Tensors, *, unfused: bool = False) -> Path:
    """A checkpoint with FP8 attention, FP8 experts and scales of inputs and caches; names are canonical."""
    tensors = load_file(saved / "model.safetensors")
    prefix = stored_name(tensors, "layers.0.self_attn.q_proj.weight").removesuffix("layers.0.self_attn.q_proj.weight")
    for name in [name for name in tensors if "self_attn" in name and name.startswith(f"{prefix}layers.")]:
        tensors[name], tensors[f"{name}_scale"] = quantised(tensors[name])
    for layer in (1, 3):
        owner = f"{prefix}layers.{layer}.feed_forward.experts"
        gate_up, down = tensors.pop(f"{owner}.gate_up_proj"), tensors.pop(f"{owner}.down_proj")
        if not unfused:
            for part, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
                tensors[f"{owner}.{part}"], tensors[f"{owner}.{part}_scale"] = quantised(weight)
            continue
        for expert in range(4):
            for part, weight in zip(("gate", "up", "down"), (*gate_up[expert].chunk(2, -1), down[expert]), strict=True):
                name = f"{owner}.{expert}.{part}_proj.weight"
                tensors[name], tensors[f"{name}_scale"] = quantised(weight.T.contiguous())
    tensors |= {f"{prefix}{name}": scale for name, scale in scales.items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text((saved / "config.json").read_text())
    return directory


def imported(checkpoint: Path, output: Path) -> tuple[CalibrationFile, dict[str, torch.Tensor]]:
    with open_checkpoint(checkpoint) as source:
        description = import_scales(source, output)
        file = CalibrationFile.open(output, source.fingerprint())
    assert json.loads((output / "calibration.json").read_text()) == description
    assert "http" not in (output / "report.html").read_text()
    return file, load_file(output / "scales.safetensors")


def attention(**scales: float) -> Tensors:
    return {f"layers.{layer}.self_attn.{part}.input_scale": torch.tensor([scale + layer])
            for layer in range(4) for part, scale in scales.items()}


def test_experts_one_by_one(saved: Path, tmp_path: Path) -> None:
    """As compressed-tensors writes them; gate and up meet one input, and the larger of their scales holds."""
    scales = {f"{EXPERTS}.{expert}.{part}_proj.input_scale": torch.tensor(0.5 * expert + shift)
              for expert in range(4) for part, shift in (("gate", 0.25), ("up", 0.125), ("down", 2.0))}
    scales[f"{EXPERTS}.2.up_proj.input_scale"] = torch.tensor([7.0])
    file, stored = imported(write(saved, tmp_path / "checkpoint", scales, unfused=True), tmp_path / "out")
    assert file.observer == "imported"
    assert stored[f"imported/{EXPERTS}.gate_up_proj"].tolist() == [448 * scale for scale in (0.25, 0.75, 7.0, 1.75)]
    assert stored[f"imported/{EXPERTS}.down_proj"].tolist() == [448 * scale for scale in (2.0, 2.5, 3.0, 3.5)]
    assert float(file.input_amax(f"{EXPERTS}.down_proj")[2]) == 448 * 3


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1, 1)])
def test_fused_experts(shape: tuple[int, ...], saved: Path, tmp_path: Path) -> None:
    """As ModelOpt writes them: one scale, or one for each expert."""
    scale = torch.arange(1.0, 5.0)[: max(torch.Size(shape).numel(), 1)].reshape(shape)
    scales = {f"{EXPERTS}.gate_up_proj_input_scale": scale, f"{EXPERTS}.down_proj_input_scale": torch.tensor(2.0)}
    file, _ = imported(write(saved, tmp_path / "checkpoint", scales), tmp_path / "out")
    expected = scale.reshape(-1).expand(4) * 448
    assert torch.equal(file.input_amax(f"{EXPERTS}.gate_up_proj"), expected)
    assert file.input_amax(f"{EXPERTS}.down_proj").tolist() == [896.0] * 4


def test_weights_that_meet_one_input_have_one_scale(saved: Path, tmp_path: Path) -> None:
    scales = attention(q_proj=0.5, k_proj=2.0, v_proj=1.0, o_proj=0.25)
    dense = {f"layers.0.feed_forward.{part}.input_scale": torch.tensor(scale)
             for part, scale in (("gate_proj", 1.0), ("up_proj", 3.0), ("down_proj", 9.0))}
    file, _ = imported(write(saved, tmp_path / "checkpoint", scales | dense), tmp_path / "out")
    for part in "qkv":
        name = f"layers.1.self_attn.{part}_proj.weight"
        assert float(file.input_amax(name)) == 448 * 3
        assert file.outliers(name) is None
    assert float(file.input_amax("layers.1.self_attn.o_proj.weight")) == 448 * 1.25
    assert float(file.input_amax("layers.0.feed_forward.gate_proj.weight")) == 448 * 3
    assert float(file.input_amax("layers.0.feed_forward.down_proj.weight")) == 448 * 9


def test_weights_without_scales_stay_in_high_precision(saved: Path, tmp_path: Path) -> None:
    """A build stores exactly what has a scale in FP8, so that it asks the calibration for nothing that is not there."""
    scales = attention(q_proj=1.0, k_proj=1.0, v_proj=1.0, o_proj=1.0)
    scales |= {f"{EXPERTS}.{part}_input_scale": torch.tensor(1.0) for part in ("gate_up_proj", "down_proj")}
    checkpoint = write(saved, tmp_path / "checkpoint", scales)
    file, stored = imported(checkpoint, tmp_path / "out")
    recipe = RECIPES["fp8"].with_high_precision(file.high_precision_parts)
    with open_checkpoint(checkpoint) as source:
        in_fp8 = {name for name, info in source.tensors.items() if isinstance(recipe.layout_of(name), Fp8Format)
                  and len(info.shape) > 1 and "embedding" not in name}
    assert in_fp8 == {name.removeprefix("imported/") for name in stored}
    assert len(in_fp8) == 4 * 4 + 2


def test_a_bundle_is_built_of_them(saved: Path, tmp_path: Path) -> None:
    """With scales that are large enough the FP8 model stays close to the one in floats."""
    scales = attention(q_proj=0.05, k_proj=0.04, v_proj=0.05, o_proj=0.05)
    scales |= {f"layers.{layer}.feed_forward.experts.{part}_input_scale": torch.tensor(0.02)
               for layer in (1, 3) for part in ("gate_up_proj", "down_proj")}
    checkpoint = write(saved, tmp_path / "checkpoint", scales)
    imported(checkpoint, tmp_path / "out")
    logits = []
    with open_checkpoint(checkpoint) as source:
        for recipe, calibration in (("fp32", None), ("fp8", tmp_path / "out")):
            build_bundle(source, tmp_path / recipe, recipe=recipe, calibration=calibration)
            engine = Engine.load(tmp_path / recipe, threads=1)
            logits.append(engine.prefill(engine.new_sequence(), herds.tokens(100), all_positions=True))
    assert 0 < fidelity(*logits).mean_kl < 0.05


@pytest.mark.parametrize("spelling", ["{}_scale", "{}_proj.{}_scale", "{}_proj.output_scale"])
def test_keys_and_values(spelling: str, saved: Path, tmp_path: Path) -> None:
    scales = attention(q_proj=1.0) | {
        f"layers.{layer}.self_attn.{spelling.format(part, part)}": torch.tensor([value])
        for layer in (0, 2) for part, value in (("k", 0.25), ("v", 0.5 + layer))
    }
    scales[f"layers.3.self_attn.{spelling.format('k', 'k')}"] = torch.tensor(1.0)
    file, _ = imported(write(saved, tmp_path / "checkpoint", scales), tmp_path / "out")
    assert [file.kv_amax(layer) for layer in range(4)] == [(112, 224), None, (112, 448 * 2.5), None]


def test_checkpoints_without_scales_of_inputs_are_refused(saved: Path, tmp_path: Path) -> None:
    """Dynamic activations (RedHatAI's FP8-dynamic, Meta's Maverick), or none."""
    for name, checkpoint in (("dynamic", write(saved, tmp_path / "checkpoint", {})), ("floats", saved)):
        with open_checkpoint(checkpoint) as source, pytest.raises(HerdError, match="carries no scales of in") as caught:
            import_scales(source, tmp_path / name)
        assert str(checkpoint) in str(caught.value)
        assert "calibrate it with data" in str(caught.value)
        assert not (tmp_path / name).exists()


def test_a_wrong_number_of_scales(saved: Path, tmp_path: Path) -> None:
    scales = {f"{EXPERTS}.gate_up_proj_input_scale": torch.ones(3)}
    with open_checkpoint(write(saved, tmp_path / "checkpoint", scales)) as source:
        with pytest.raises(HerdError, match=rf"{EXPERTS}.gate_up_proj has 3 scales of inputs for 4 experts"):
            import_scales(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_an_output_is_not_replaced_unasked(saved: Path, tmp_path: Path) -> None:
    with open_checkpoint(write(saved, tmp_path / "checkpoint", attention(q_proj=1.0))) as source:
        import_scales(source, tmp_path / "out")
        with pytest.raises(HerdError, match="exists already"):
            import_scales(source, tmp_path / "out")
        import_scales(source, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(("scale", "shown"), [(torch.nan, "nan"), (torch.inf, "inf"), (-1.0, "-448"), (0.0, "0"),
                                              (1e-45, "6.2"), (3e38, "inf")])
def test_scales_that_are_none_are_named(scale: float, shown: str, saved: Path, tmp_path: Path) -> None:
    checkpoint = write(saved, tmp_path / "checkpoint", attention(q_proj=0.5) | {
        "layers.2.self_attn.q_proj.input_scale": torch.tensor(scale)})
    with open_checkpoint(checkpoint) as source, pytest.raises(HerdError, match=rf"q_proj\.weight is {shown}") as caught:
        import_scales(source, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_scales_of_experts_that_are_not_there(saved: Path, tmp_path: Path) -> None:
    scales = {f"{EXPERTS}.1000000.up_proj.input_scale": torch.tensor(1.0)}
    with open_checkpoint(write(saved, tmp_path / "checkpoint", scales)) as source, \
            pytest.raises(HerdError, match="has a scale of its input, but the model has 4 experts"):
        import_scales(source, tmp_path / "out")
