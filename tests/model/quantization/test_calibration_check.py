"""What a calibration may hold when a build opens it: parts of the model, names, shapes, magnitudes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from herdgraph.errors import HerdError
from herdgraph.model.checkpoint import Checkpoint
from herdgraph.model.checkpoint.tensors.write import write_tensors
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.names import expected_tensors
from herdgraph.model.config.presets import TINY
from herdgraph.model.quantization.calibration_check import calibration_for, check_measurements
from herdgraph.model.quantization.calibration_file import FORMAT, HESSIANS, SCALES, CalibrationFile
from herdgraph.model.quantization.formats import Fp8Format
from herdgraph.model.quantization.recipes import RECIPES, Recipe

TEXT = HerdConfig(text=TINY.text)
Q_PROJ, EXPERTS = "layers.0.self_attn.q_proj.weight", "layers.1.feed_forward.experts.down_proj"
KV = "layers.0.self_attn"
SHAPES = expected_tensors(TEXT)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path, TEXT, {}, [])


def scales() -> dict[str, torch.Tensor]:
    """What the FP8 recipe asks for."""
    found = {name: torch.ones(shape[:1] if len(shape) == 3 else ()) for name, shape in SHAPES.items()
             if isinstance(RECIPES["fp8"].layout_of_tensor(name, shape), Fp8Format)}
    found |= {f"layers.{layer}.self_attn.kv_amax": torch.ones(2) for layer in range(4)}
    return {f"mse/{name}": amax for name, amax in found.items()} | {f"input_energy/{Q_PROJ}": torch.zeros(64)}


def opened(
    checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], recipe: Recipe = RECIPES["fp8"], **description: Any
) -> CalibrationFile | None:
    path = checkpoint.directory / "calibration"
    path.mkdir()
    content = {"format": FORMAT, "fingerprint": checkpoint.fingerprint(), "observer": "mse", "high_precision_parts": []}
    (path / "calibration.json").write_text(json.dumps(content | description))
    write_tensors(tensors, path / SCALES)
    return calibration_for(recipe, path, checkpoint)


def test_what_was_measured_is_opened(checkpoint: Checkpoint) -> None:
    found = opened(checkpoint, scales(), high_precision_parts=["shared_expert", "layers.2"])
    assert found is not None
    assert found.high_precision_parts == ["shared_expert", "layers.2"]


@pytest.mark.parametrize("parts", [5, None, "x", [5], [None], {"a": 1}, True])
def test_parts_in_high_precision_are_a_list_of_texts(parts: object, checkpoint: Checkpoint) -> None:
    with pytest.raises(HerdError, match=r"high_precision_parts of .*, a list of parts of the model is needed"):
        opened(checkpoint, scales(), high_precision_parts=parts)


@pytest.mark.parametrize("part", ["nonsense", "(", "", "layers.9", "self_attn.", "\n" * 1000])
def test_parts_in_high_precision_belong_to_the_model(part: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(HerdError, match="in high precision, and no tensor of the model belongs to it") as caught:
        opened(checkpoint, scales(), high_precision_parts=[part])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("observer", [None, 5, ["mse"]])
def test_the_observer_is_a_name(observer: object, checkpoint: Checkpoint) -> None:
    with pytest.raises(HerdError, match="the name of one is needed"):
        opened(checkpoint, scales(), observer=observer)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, -1.0, 3e38, 1e-45])
@pytest.mark.parametrize("name", [f"mse/{Q_PROJ}", f"mse/{EXPERTS}", f"mse/{KV}.kv_amax"])
def test_magnitudes_are_positive_numbers(name: str, value: float, checkpoint: Checkpoint) -> None:
    tensors = scales()
    tensors[name].view(-1)[-1] = value
    with pytest.raises(HerdError, match=rf"{name} in .* is \S+, it must be within 3.55e-15 and 1.84e\+19"):
        opened(checkpoint, tensors)


@pytest.mark.parametrize(("name", "tensor"), [
    (f"mse/{Q_PROJ}", torch.ones(2)), (f"mse/{Q_PROJ}", torch.ones(0)), (f"mse/{EXPERTS}", torch.ones(())),
    (f"mse/{EXPERTS}", torch.ones(3)), (f"mse/{KV}.kv_amax", torch.ones(1)), (f"input_energy/{Q_PROJ}", torch.ones(3)),
    (f"mse/{Q_PROJ}", torch.ones((), dtype=torch.int64)), (f"input_energy/{EXPERTS}", torch.ones(4)),
    ("mse/layers.0.nonsense", torch.ones(())), ("nonsense", torch.ones(())),
])
def test_names_and_shapes_are_those_of_the_model(name: str, tensor: torch.Tensor, checkpoint: Checkpoint) -> None:
    with pytest.raises(HerdError, match=r"has shape .* the model needs|is no input of the model") as caught:
        opened(checkpoint, scales() | {name: tensor})
    assert "\n" not in str(caught.value)


def test_energies_are_finite(checkpoint: Checkpoint) -> None:
    with pytest.raises(HerdError, match=r"input_energy/\S+ in \S+ holds a NaN at \[0\]"):
        opened(checkpoint, scales() | {f"input_energy/{Q_PROJ}": torch.full((64,), torch.nan)})


@pytest.mark.parametrize("share", [-0.1, 1.5, torch.nan, torch.inf])
def test_shares_are_within_0_and_1(share: float, checkpoint: Checkpoint) -> None:
    with pytest.raises(HerdError, match=r"residual_share/\S+ in \S+ is \S+, a share is within 0 and 1: write"):
        opened(checkpoint, scales() | {f"residual_share/{KV}": torch.tensor(share)})


def test_a_scale_that_is_absent_is_named_before_the_capture(checkpoint: Checkpoint) -> None:
    tensors = scales()
    del tensors[f"mse/{Q_PROJ}"]
    with pytest.raises(HerdError, match=rf"says nothing of {Q_PROJ} by observer 'mse': write it again"):
        opened(checkpoint, tensors)


def test_caches_of_rotated_recipes_keep_rotated_values(checkpoint: Checkpoint) -> None:
    """A calibration knows the magnitudes of values in both bases, and is told of the one that is missing."""
    recipe = replace(RECIPES["int8"], caches="int8")
    tensors = {f"max/layers.{layer}.self_attn.kv_amax": torch.tensor([2.0, 9.0]) for layer in range(4)}
    with pytest.raises(HerdError, match=rf"says nothing of {KV}.rotated_value_amax by observer 'max': write it again"):
        opened(checkpoint, tensors, recipe)
    shutil.rmtree(checkpoint.directory / "calibration")
    tensors |= {f"max/layers.{layer}.self_attn.rotated_value_amax": torch.tensor(5.0) for layer in range(4)}
    found = opened(checkpoint, tensors, recipe)
    assert found is not None
    assert found.required_kv_amax(3, observer="max") == (2.0, 5.0)
    assert replace(found, source=checkpoint).required_kv_amax(3, observer="max") == (2.0, 9.0)


def test_four_bits_need_hessians(checkpoint: Checkpoint) -> None:
    with pytest.raises(HerdError, match=r"has no Hessians, by which weights of 4 bits .* without --no-hessians"):
        opened(checkpoint, scales(), recipe=RECIPES["int4"])


def with_hessian(checkpoint: Checkpoint, name: str, hessian: torch.Tensor) -> CalibrationFile:
    (checkpoint.directory / "calibration" / HESSIANS).mkdir(parents=True)
    write_tensors({name: hessian}, checkpoint.directory / "calibration" / HESSIANS / "layers.1.safetensors")
    return CalibrationFile(checkpoint.directory / "calibration", {}, "mse")


@pytest.mark.parametrize(("place", "value", "message"), [
    ((1, 3, 3), torch.nan, "holds a NaN"), ((1, 0, 4), torch.inf, "holds an infinity"), ((1, 2, 2), -1.0, "negative"),
])
def test_hessians_are_sums_of_squares(
    place: tuple[int, ...], value: float, message: str, checkpoint: Checkpoint
) -> None:
    hessian = torch.eye(48).repeat(4, 1, 1)
    hessian[place] = value
    file = with_hessian(checkpoint, EXPERTS, hessian)
    assert file.hessian(EXPERTS, 0) is not None
    with pytest.raises(HerdError, match=f"the Hessian of {EXPERTS} in .*{message}"):
        file.hessian(EXPERTS, 1)


def test_hessians_have_the_shape_of_the_inputs(checkpoint: Checkpoint) -> None:
    with_hessian(checkpoint, EXPERTS, torch.eye(47).repeat(4, 1, 1))
    (checkpoint.directory / "calibration").rename(checkpoint.directory / "other")
    with pytest.raises(HerdError, match=r"has shape \[4, 47, 47\] and type float32, the model needs \[4, 48, 48\]"):
        check_measurements(checkpoint.directory / "other", [], TEXT)
