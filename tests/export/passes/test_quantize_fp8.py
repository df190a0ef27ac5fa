"""FP8 products: the same codes as a fake quantisation in torch that shares no code, in every form that experts take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from herdgraph.calibration.calibrate import Options, calibrate
from herdgraph.calibration.windows import Data, Window
from herdgraph.errors import HerdError
from herdgraph.export.passes import (
    LowerExpertsDense,
    LowerExpertsGathered,
    LowerExpertsUnrolled,
    LowerRoutedExperts,
    QuantizeFp8,
)
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.quantization.calibration_file import CalibrationFile
from herdgraph.model.quantization.e4m3 import expert_input_multipliers
from herdgraph.model.quantization.recipes import RECIPES
from herdgraph.runtimes import Engine
from support import herds
from support.graphs import operators, parse, run

T, D, F, E = 37, 16, 24, 5
TEXT_ONLY = HerdConfig(text=TINY.text)
LAYER = "layers.0.feed_forward.experts"


def calibration(directory: Path, **tensors: Tensor) -> CalibrationFile:
    """A calibration with an observer called ``max``; a name's dots are written as __ and its / as 3 of them."""
    save_file({name.replace("___", "/").replace("__", "."): value for name, value in tensors.items()},
              directory / "scales.safetensors")
    return CalibrationFile(directory, {}, "max")


def fake(x: Tensor, scale: float | Tensor) -> Tensor:
    """Rounding to E4M3 and back, written down for these tests."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32) * scale


def step(amax: Tensor) -> Tensor:
    """The bfloat16 number next above amax / 448."""
    scale = amax / 448
    up = scale.bfloat16().float()
    return torch.where(up < scale, (scale * (1 + 2**-8)).bfloat16().float(), up)


def fake_weight(weight_KN: Tensor) -> Tensor:
    """Every output channel by its own scale."""
    return fake(weight_KN, step(weight_KN.abs().amax(0)))


def fake_product(
    x: Tensor, weight_KN: Tensor, scale: float | Tensor, outliers: Tensor
) -> Tensor:
    """A product but for the channels that are not rounded, and those."""
    rest = torch.ones(len(weight_KN))
    rest[outliers] = 0
    return fake(x, scale) @ fake_weight(weight_KN * rest[:, None]) + x[..., outliers] @ weight_KN[outliers]


def largest(energy: Tensor) -> Tensor:
    """The channels that are not rounded."""
    return energy.argsort(descending=True)[: min(16, len(energy) // 8)]


def test_a_product_gives_the_codes_of_fake_quantisation(tmp_path: Path) -> None:
    x, weight = 3 * torch.randn(T, D) + torch.linspace(-8, 8, D), torch.randn(D, F)
    amax = x.abs().max()
    energy = torch.randn(D).square()
    found = calibration(tmp_path, max___w=amax, input_energy___w=energy)
    text = f"g (float[{T},{D}] x, float[{D},{F}] w) => (float[{T},{F}] y) {{ y = MatMul (x, w) }}"
    model = parse(text, w=weight.numpy())
    QuantizeFp8(RECIPES["fp8"], found)(model)
    wanted = fake_product(x, weight, step(amax), largest(energy))
    np.testing.assert_allclose(run(model, x=x.numpy())[0], wanted, rtol=1e-5, atol=1e-4)
    assert operators(model)["MatMul"] == 2
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = node.inputs[1]
            assert scale is not None
            assert not scale.shape or scale.shape.numpy() == (), "TensorRT gets scales of another rank wrong"
            assert "axis" not in node.attributes
            assert "block_size" not in node.attributes


def experts_model(weights: tuple[Tensor, Tensor]) -> ir.Model:
    """Routed experts with their logits as an input."""
    text = f"""g (float[t,{D}] x, float[t,{E}] logits, float[{E},{D},{2 * F}] gate_up, float[{E},{F},{D}] down)
        => (float[t,{D}] y) {{ y = herdgraph.RoutedExperts <top_k = 1> (x, logits, gate_up, down) }}"""
    model = parse(text, gate_up=weights[0].numpy(), down=weights[1].numpy())
    for value, name in zip(list(model.graph.initializers.values()), ("gate_up_proj", "down_proj"), strict=True):
        model.graph.initializers.pop(str(value.name))
        value.name = f"{LAYER}.{name}"
        model.graph.register_initializer(value)
    next(iter(model.graph)).name = LAYER
    return model


@pytest.mark.parametrize(
    "lowering", [LowerExpertsDense, LowerExpertsGathered, LowerExpertsUnrolled, LowerRoutedExperts])
def test_experts_match_fake_quantization(tmp_path: Path, lowering: type) -> None:
    """Every lowering of experts gives the codes of fake quantisation."""
    x, logits = torch.randn(T, D), torch.randn(T, E)
    gate_up, down = torch.randn(E, D, 2 * F), torch.randn(E, F, D)
    chosen = logits.argmax(-1)
    scaled = x * torch.sigmoid(logits.gather(1, chosen[:, None]))
    # Experts whose inputs differ by orders of magnitude, as those of down_proj do.
    gate_up *= torch.tensor([1.0, 9.0, 0.1, 1.0, 3.0])[:, None, None]
    amax = {"gate_up_proj": torch.zeros(E), "down_proj": torch.zeros(E)}
    hidden = {}
    for expert in range(E):
        rows = scaled[chosen == expert]
        gate, up = (rows @ gate_up[expert]).chunk(2, -1)
        hidden[expert] = torch.nn.functional.silu(gate) * up
        amax["gate_up_proj"][expert], amax["down_proj"][expert] = rows.abs().max(), hidden[expert].abs().max()
    prefix = f"max___{LAYER.replace('.', '__')}__"
    energies = {"gate_up_proj": scaled.square().mean(0), "down_proj": torch.cat(list(hidden.values())).square().mean(0)}
    found = calibration(tmp_path, **{f"{prefix}{name}": value for name, value in amax.items()},
                        **{f"{prefix.replace('max', 'input_energy')}{name}": value for name, value in energies.items()})

    wanted = torch.zeros(T, D)
    for expert in range(E):
        scale = {name: step(values.max()) / 2.0 ** torch.floor(torch.log2(values.max() / values[expert]))
                for name, values in amax.items()}
        rows = chosen == expert
        outliers = {name: largest(energy) for name, energy in energies.items()}
        gate, up = fake_product(
            scaled[rows], gate_up[expert], scale["gate_up_proj"], outliers["gate_up_proj"]).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        wanted[rows] = fake_product(inner, down[expert], scale["down_proj"], outliers["down_proj"])

    model = experts_model((gate_up, down))
    lowering()(model)
    QuantizeFp8(RECIPES["fp8"], found)(model)
    apart = lowering in (LowerExpertsUnrolled, LowerRoutedExperts)
    assert operators(model)["QuantizeLinear"] == (2 * E if apart else 2)
    np.testing.assert_allclose(run(model, x=x.numpy(), logits=logits.numpy())[0], wanted, rtol=1e-4, atol=2e-3)


def test_range_of_expert_input_multipliers() -> None:
    amax = torch.tensor([1.0, 0.4, 100.0, 7e-6])
    found = torch.from_numpy(expert_input_multipliers(amax))
    assert torch.equal(torch.log2(found), torch.log2(found).round())
    assert (amax * found <= 100.0).all()
    assert (amax * found > 50.0).all()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fp8")
    herds.save(TEXT_ONLY, directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        data = Data([Window(herds.tokens(60, seed)) for seed in range(4)], [])
        calibrate(checkpoint, directory / "calibration", data, Options(observer="max", hessians=False))  # to nearest
        build_bundle(checkpoint, directory / "bundle", recipe="fp8", calibration=directory / "calibration")
    return directory


def test_a_whole_decoder_is_that_of_fake_quantisation(tiny: Path) -> None:
    """Sums in another order move a value over the edge of a code now and then; nearly all logits are equal."""
    scales = load_file(tiny / "calibration" / "scales.safetensors")
    with open_checkpoint(tiny / "checkpoint") as checkpoint:
        model = Llama4.from_checkpoint(checkpoint).decoder
    for name, part in model.named_modules():
        weight = f"{name}.weight"
        if isinstance(part, torch.nn.Linear) and f"max/{weight}" in scales:
            def forward(x: Tensor, part: torch.nn.Linear = part, weight: str = weight) -> Tensor:
                outliers = largest(scales[f"input_energy/{weight}"])
                return fake_product(x, part.weight.T, step(scales[f"max/{weight}"]), outliers)
            part.forward = forward  # type: ignore[method-assign]
        elif name.endswith("experts"):
            def experts(x: Tensor, logits: Tensor, part: torch.nn.Module = part, name: str = name) -> Tensor:
                y, chosen = torch.zeros_like(x), logits.argmax(-1)
                outliers = [largest(scales[f"input_energy/{name}.{part}_proj"]) for part in ("gate_up", "down")]
                scaled = x * torch.sigmoid(logits.gather(1, chosen[:, None]))
                for expert in range(len(part.down_proj)):
                    rows = chosen == expert
                    found = []
                    for matrix in ("gate_up_proj", "down_proj"):
                        amax = scales[f"max/{name}.{matrix}"]
                        found.append(step(amax.max()) / 2.0 ** torch.floor(torch.log2(amax.max() / amax[expert])))
                    gate, up = fake_product(
                        scaled[rows], part.gate_up_proj[expert], found[0], outliers[0]).chunk(2, -1)
                    inner = torch.nn.functional.silu(gate) * up
                    y[rows] = fake_product(inner, part.down_proj[expert], found[1], outliers[1])
                return y
            part.forward = experts  # type: ignore[method-assign]
    ids = herds.tokens(40, seed=9)
    with torch.inference_mode():
        wanted = model(torch.tensor([ids]), None)[0][0].numpy()
    engine = Engine.load(tiny / "bundle")
    found = engine.prefill(engine.new_sequence(), ids, all_positions=True)
    difference = np.abs(found - wanted)
    assert np.median(difference) < 2e-5 * wanted.std()
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.9999
    exact = herds.logits(herds.reference(TEXT_ONLY), ids).numpy()
    assert np.abs(found - exact).mean() > 100 * np.median(difference), "nothing was quantised"


def test_a_build_without_calibration_is_refused(tiny: Path, tmp_path: Path) -> None:
    with open_checkpoint(tiny / "checkpoint") as checkpoint, pytest.raises(HerdError, match="pass --calibration"):
        build_bundle(checkpoint, tmp_path / "bundle", recipe="fp8")
    assert not (tmp_path / "bundle").exists()


def test_an_input_that_was_not_measured_is_named(tmp_path: Path) -> None:
    text = "g (float[2,4] x, float[4,3] w) => (float[2,3] y) { y = MatMul (x, w) }"
    model = parse(text, w=np.ones((4, 3), np.float32))
    with pytest.raises(HerdError, match="says nothing of w"):
        QuantizeFp8(RECIPES["fp8"], calibration(tmp_path, max___other=torch.tensor(1.0)))(model)
