"""GPTQ: less error on the data than rounding to nearest, from Hessians to a built bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from herdgraph.calibration.calibrate import Options, calibrate
from herdgraph.calibration.hessian import SHARED_HESSIAN_WEIGHT
from herdgraph.calibration.measure import measure
from herdgraph.calibration.windows import Data, Window, data_of
from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.verify import fidelity
from herdgraph.export.weights.block import BlockCodes, BlockRounder, in_blocks
from herdgraph.export.weights.gptq import gptq_quantize, inverse_hessian_cholesky
from herdgraph.export.weights.stream import Weight
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.checkpoint.rotated import RotatedCheckpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.data import Record
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.quantization.calibration_file import CalibrationFile
from herdgraph.model.quantization.formats import BlockFormat
from herdgraph.model.quantization.recipes import RECIPES
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
    codes, scales, zeros = gptq_quantize(rows, inverse_hessian_cholesky(x.T @ x), BlockRounder(LAYOUT))
    assert codes.min() >= 0
    assert codes.max() <= 15
    found = ((codes - zeros[..., None]) * scales[..., None]).flatten(1)
    plain = torch.from_numpy(BlockRounder(LAYOUT).quantize(in_blocks(rows.numpy(), 16)).values()).flatten(1)
    errors = [float(((values - rows) @ x.T).square().sum()) for values in (found, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_white_data_gives_nearest_codes_of_the_first_column() -> None:
    rows = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    codes, scales, zeros = gptq_quantize(rows, inverse_hessian_cholesky(torch.eye(32)), BlockRounder(LAYOUT))
    plain = BlockRounder(LAYOUT).quantize(in_blocks(rows.numpy(), 16))
    np.testing.assert_array_equal(codes[..., 0].numpy(), plain.codes[..., 0])
    np.testing.assert_allclose(scales.numpy(), plain.scales, rtol=1e-5)
    np.testing.assert_array_equal(zeros.numpy(), plain.zeros)


def test_inputs_never_seen_do_not_break_the_factor() -> None:
    x = _data()
    x[:, 5:20] = 0
    codes, scales, _ = gptq_quantize(torch.randn(3, 64), inverse_hessian_cholesky(x.T @ x), BlockRounder(LAYOUT))
    assert codes.isfinite().all()
    assert scales.isfinite().all()
    assert inverse_hessian_cholesky(torch.zeros(16, 16)).isfinite().all()


def test_a_width_that_no_block_divides() -> None:
    class Source:
        def read(self, _name: str, index: int | slice | None = None) -> torch.Tensor:
            return values if index is None else values[index]

    values, x = torch.randn(24, 40), _data(inputs=40)
    codes = BlockCodes(Weight(Source(), "w", (24, 40)).transposed(), LAYOUT, x.T @ x)
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
        calibrate(source, output, data, Options(RECIPES["int4"]))
    return output


def test_hessians_are_those_of_the_inputs(checkpoint: Path, tmp_path: Path) -> None:
    """Hooks on the torch model see the same inputs, an expert's scaled by its token's score."""
    ids, seen = herds.tokens(50), []
    with open_checkpoint(checkpoint) as source:
        rotated = RotatedCheckpoint(source)
        measure(rotated, RECIPES["int4"], Data([Window(ids)], []), tmp_path, key="", min_tokens_shown=1)
        decoder = Llama4.from_checkpoint(rotated).eval().decoder
    experts = decoder.layers[1].feed_forward.experts
    experts.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    with torch.inference_mode():
        decoder(torch.tensor([ids]))
    x_TD, logits_TE = seen[0]
    stored = load_file(tmp_path / "hessians" / "layers.1.safetensors")
    name = "layers.1.feed_forward.experts.gate_up_proj"
    best, sums = logits_TE.max(-1), torch.zeros(4, 64, 64)
    for expert in range(4):
        rows = (x_TD * torch.sigmoid(best.values)[:, None])[best.indices == expert]
        assert len(rows), "its own tokens only, none is shown in addition"
        sums[expert] = rows.T @ rows
    torch.testing.assert_close(stored[name], sums + SHARED_HESSIAN_WEIGHT * sums.sum(0), atol=1e-3, rtol=1e-4)
    shared = stored["layers.1.feed_forward.shared_expert.up_proj.weight"]
    torch.testing.assert_close(shared, x_TD.T @ x_TD, atol=1e-3, rtol=1e-4)
    assert not any("self_attn" in name or "router" in name for name in stored)
    assert not list(tmp_path.glob("hessians/*vision*"))


def test_a_bundle_rounded_by_data_is_closer_on_it(checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    logits = {}
    with open_checkpoint(checkpoint) as source:
        for name, recipe, measured in (("exact", "fp32", None), ("plain", "int4", None), ("gptq", "int4", calibration)):
            build_bundle(source, tmp_path / name, recipe=recipe, calibration=measured)
            engine = Engine.load(tmp_path / name, threads=1)
            ids = engine.processor.tokenizer.encode(TEXT)[:400]
            logits[name] = engine.prefill(engine.new_sequence(), ids, all_positions=True)
    plain, gptq = (fidelity(logits["exact"], logits[name]) for name in ("plain", "gptq"))
    assert gptq.mean_kl < 0.7 * plain.mean_kl


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
    assert file.hessian("layers.0.self_attn.q_proj.weight") is None


def test_a_calibration_for_another_recipe_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Weights that it does not know would be rounded to nearest, and nobody would notice."""
    with open_checkpoint(checkpoint) as source:
        data = data_of(source, [Record("text", "text", document=(TEXT,))], most_tokens=600)
        calibrate(source, tmp_path / "calibration", data, Options(RECIPES["int8"]))
        with pytest.raises(HerdError, match=r"says nothing of .* calibrate --recipe int4"):
            build_bundle(source, tmp_path / "bundle", recipe="int4", calibration=tmp_path / "calibration")
    assert not (tmp_path / "bundle").exists()
