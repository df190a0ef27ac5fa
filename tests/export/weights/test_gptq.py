"""GPTQ: less error on the data than rounding to nearest, from Hessians to a built bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file

from herdgraph.calibration.calibrate import Options, calibrate
from herdgraph.calibration.hessian import SHARED_HESSIAN_WEIGHT
from herdgraph.calibration.measure import measure
from herdgraph.calibration.windows import Data, Window, data_of
from herdgraph.errors import HerdError
from herdgraph.export.bounds import BOUNDS
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.verify import compare, fidelity
from herdgraph.export.weights.block import BlockCodes, BlockRounder, filled_up
from herdgraph.export.weights.channel import ZERO, ChannelCodes
from herdgraph.export.weights.gptq import DAMPING, gptq_quantize, inverse_hessian_cholesky
from herdgraph.export.weights.stream import Weight
from herdgraph.model.checkpoint import Checkpoint, open_checkpoint
from herdgraph.model.checkpoint.reader import TensorReader
from herdgraph.model.checkpoint.rotated import RotatedCheckpoint
from herdgraph.model.config.names import expected_tensors
from herdgraph.model.config.presets import TINY
from herdgraph.model.data import Record
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.quantization.calibration_file import CalibrationFile
from herdgraph.model.quantization.formats import BlockFormat
from herdgraph.model.quantization.recipes import RECIPES, needs_hessian
from herdgraph.runtimes import Engine
from support import herds

LAYOUT = BlockFormat(4, 16)
TEXT = "The herd grazes where the grass is greenest, and every calf follows its own mother. " * 60


def _data(tokens: int = 400, inputs: int = 64) -> torch.Tensor:
    """Inputs that are correlated, as real ones are: a few directions and some noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(8, inputs, generator=generator)
    noise = torch.randn(tokens, inputs, generator=generator)
    return torch.randn(tokens, 8, generator=generator) @ directions + 0.1 * noise


def test_errors_on_the_data_are_less_than_half_of_rounding() -> None:
    x = _data()
    rows = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    blocks = BlockRounder(LAYOUT).quantize(rows.numpy(), inverse_hessian_cholesky(x.T @ x))
    assert blocks.codes.max() <= 15
    found = torch.from_numpy(blocks.values()).flatten(1)
    plain = torch.from_numpy(BlockRounder(LAYOUT).quantize(filled_up(rows.numpy(), 16)).values()).flatten(1)
    errors = [float(((values - rows) @ x.T).square().sum()) for values in (found, plain)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("centered", [False, True])
def test_channels_of_8_bits_are_rounded_by_data_too(centered: bool) -> None:
    x = _data(inputs=40)
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    errors = []
    for hessian in (lambda: x.T @ x, None):
        codes = ChannelCodes(ir.Tensor(weight.numpy()), hessian, centered=centered)
        values = (codes.numpy().astype(np.float32) - ZERO) * codes.scales()
        assert np.abs(codes.numpy().astype(int) - ZERO).max() == 127
        errors.append(float((x @ (torch.from_numpy(values) - weight)).square().sum()))
    assert errors[0] < 0.5 * errors[1]


def test_white_data_gives_nearest_codes_of_the_first_column() -> None:
    rows = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    found = BlockRounder(LAYOUT).quantize(rows.numpy(), inverse_hessian_cholesky(torch.eye(32)))
    plain = BlockRounder(LAYOUT).quantize(rows.numpy())
    np.testing.assert_array_equal(found.codes[..., 0], plain.codes[..., 0])
    np.testing.assert_allclose(found.scales, plain.scales, rtol=1e-5)
    np.testing.assert_array_equal(found.zeros, plain.zeros)


def test_the_factor_is_that_of_the_inverse() -> None:
    x = _data()
    h = (x.T @ x).double()
    factor = inverse_hessian_cholesky(h).double()
    damped = h + DAMPING * h.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(64, dtype=torch.float64), atol=1e-4, rtol=0)


def test_inputs_never_seen_do_not_break_the_factor() -> None:
    x = _data()
    x[:, 5:20] = 0
    codes, scales, _ = gptq_quantize(torch.randn(64, 3), inverse_hessian_cholesky(x.T @ x), BlockRounder(LAYOUT))
    assert codes.isfinite().all()
    assert scales.isfinite().all()
    assert inverse_hessian_cholesky(torch.zeros(16, 16)).isfinite().all()


def test_a_width_that_no_block_divides() -> None:
    class Source:
        def read(self, _name: str, index: int | slice | None = None) -> torch.Tensor:
            return values if index is None else values[index]

    values, x = torch.randn(24, 40), _data(inputs=40)
    codes = BlockCodes(Weight(Source(), "w", (24, 40)).transposed(), LAYOUT, lambda: x.T @ x)
    assert codes.numpy().shape == (24, 3, 8)
    assert codes.parameters()[0].shape == (24, 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gptq") / "checkpoint"
    herds.save(TINY, directory)
    herds.write_processor(directory)
    return directory


@pytest.fixture(scope="module")
def calibration(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("calibration") / "out"
    with open_checkpoint(checkpoint) as source:
        data = data_of(source, [Record("text", "text", document=(TEXT,))], most_tokens=5000, held_out=0)
        calibrate(source, output, data)
    return output


def inputs_of(source: TensorReader, ids: list[int]) -> dict[str, torch.Tensor]:
    """What the products of a model read, by hooks on the torch model; an expert's rows scaled by its token's score."""
    # In float64: the errors of another float32 pass would count, and they depend on the processor.
    decoder, seen = Llama4.from_checkpoint(source).eval().decoder.double(), {}

    def note(name: str, x_TD: torch.Tensor) -> None:
        seen[f"{name}.weight"] = x_TD.reshape(-1, x_TD.shape[-1])

    for name, module in decoder.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _module, inputs, name=name: note(name, inputs[0]))
        elif name.endswith("experts"):
            module.register_forward_pre_hook(lambda _module, inputs, name=name: seen.update({name: inputs}))
    with torch.inference_mode():
        decoder(torch.tensor([ids]))
    for name in [name for name in seen if name.endswith("experts")]:
        x_TD, logits_TE = seen.pop(name)
        best = logits_TE.max(-1)
        for expert in range(4):
            rows = (x_TD * torch.sigmoid(best.values)[:, None])[best.indices == expert]
            assert len(rows), "its own tokens only, none is shown in addition"
            seen[f"{name}.gate_up_proj {expert}"] = rows
    return seen


def test_hessians_are_those_of_the_inputs_in_either_basis(checkpoint: Path, tmp_path: Path) -> None:
    """Measured once; the torch model sees the same inputs as it is, and rotated, where norms' weights are 0 too."""
    ids = herds.tokens(50)
    names = [name for name, shape in expected_tensors(TINY).items() if len(shape) > 1 and needs_hessian(name)]
    with open_checkpoint(checkpoint) as plain:
        odd = WithOddNorms(plain)
        measure(odd, Data([Window(ids)], []), tmp_path, key="", min_tokens_shown=1)  # type: ignore[arg-type]
        for source in (odd, RotatedCheckpoint(odd)):  # type: ignore[arg-type]
            file = CalibrationFile(tmp_path, {}, "mse", source=source)
            seen = inputs_of(source, ids)
            for name in names:
                found = file.hessian(name)
                assert found is not None
                if name in seen:
                    assert_near(found, squares(seen[name]))
                elif name.endswith("gate_up_proj"):
                    sums = torch.stack([squares(seen[f"{name} {expert}"]) for expert in range(4)])
                    assert_near(found, sums + SHARED_HESSIAN_WEIGHT * sums.sum(0))
                    assert_near(file.hessian(name, 2), found[2])
    stored = load_file(tmp_path / "hessians" / "layers.1.safetensors")
    assert not any(part in name for name in stored for part in ("router", "norm", "up_proj.weight", "k_proj"))
    assert not list(tmp_path.glob("hessians/*vision*"))


class WithOddNorms:
    """A checkpoint whose norms before feed-forwards have weights of all kinds: zero, tiny, negative, large."""

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.config = source, source.config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        found = self.source.read(name, index)
        if name.endswith("post_attention_layernorm.weight"):
            found = found.clone()
            found[:6] = torch.tensor([0.0, 1e-30, -1.0, 20.0, -0.0, 1e-3])
        return found


def squares(x_TK: torch.Tensor) -> torch.Tensor:
    """The Hessian of some inputs."""
    return x_TK.T @ x_TK


def assert_near(found: torch.Tensor | None, wanted: torch.Tensor) -> None:
    assert found is not None
    assert float((found - wanted).norm() / wanted.norm()) < 2e-6


@pytest.mark.parametrize(("recipe", "share"), [("int4", 0.7), ("int8", 0.9)])
def test_a_bundle_rounded_by_data_is_closer_on_it(
    recipe: str, share: float, checkpoint: Path, calibration: Path, tmp_path: Path
) -> None:
    """Of what 8 bits cost, activations are most."""
    logits = {}
    with open_checkpoint(checkpoint) as source:
        builds = {"exact": ("fp32", None), "plain": (recipe, None), "gptq": (recipe, calibration)}
        for name, (precision, measured) in builds.items():
            build_bundle(source, tmp_path / name, recipe=precision, calibration=measured)
            engine = Engine.load(tmp_path / name, threads=1)
            ids = engine.processor.tokenizer.encode(TEXT)[:400]
            logits[name] = engine.prefill(engine.new_sequence(), ids, all_positions=True)
    plain, gptq = (fidelity(logits["exact"], logits[name]) for name in ("plain", "gptq"))
    assert gptq.mean_kl < share * plain.mean_kl


@pytest.mark.parametrize(("recipe", "caches"), [("int4", "int8"), ("int8", "int8"), ("fp8", "float")])
def test_one_calibration_serves_every_recipe(
    recipe: str, caches: Any, checkpoint: Path, calibration: Path, tmp_path: Path
) -> None:
    """As ``herdgraph verify`` judges it."""
    with open_checkpoint(checkpoint) as source:
        precision = replace(RECIPES[recipe], caches=caches)
        bundle = build_bundle(source, tmp_path / "bundle", recipe=precision, calibration=calibration)
        engine = Engine.load(bundle.directory, threads=1)
        ids = engine.processor.tokenizer.encode(TEXT)[:128]
        report = compare(engine, Llama4.from_checkpoint(source).eval(), ids)
    assert not list(BOUNDS[recipe].broken(report.to_json()))


def test_hessians_are_found_by_name_and_expert(checkpoint: Path, calibration: Path) -> None:
    with open_checkpoint(checkpoint) as source:
        file = CalibrationFile.open(calibration, source.fingerprint())
    stored = {name: tensor for layer in (0, 1)
              for name, tensor in load_file(calibration / "hessians" / f"layers.{layer}.safetensors").items()}
    dense, experts = "layers.0.feed_forward.gate_proj.weight", "layers.1.feed_forward.experts.down_proj"
    for name, expert, wanted in ((dense, None, stored[dense]), (experts, 2, stored[experts][2])):
        found = file.hessian(name, expert)
        assert found is not None
        torch.testing.assert_close(found, wanted)
    keys, queries = (file.hessian(f"layers.0.self_attn.{part}.weight") for part in ("k_proj", "q_proj"))
    assert keys is not None
    torch.testing.assert_close(keys, queries, msg="they read the same")
    assert file.hessian("lm_head.weight") is not None


def test_a_calibration_without_hessians_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Weights that it does not know would be rounded to nearest, and nobody would notice."""
    with open_checkpoint(checkpoint) as source:
        data = data_of(source, [Record("text", "text", document=(TEXT,))], most_tokens=600)
        calibrate(source, tmp_path / "calibration", data, Options(hessians=False))
        with pytest.raises(HerdError, match=r"has no Hessians, .* without --no-hessians"):
            build_bundle(source, tmp_path / "bundle", recipe="int4", calibration=tmp_path / "calibration")
    assert not (tmp_path / "bundle").exists()
