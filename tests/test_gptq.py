"""GPTQ: less error on the data than rounding to nearest, from moments to a built bundle."""

from __future__ import annotations

from pathlib import Path

import herds
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from herdgraph.calibration.moments import Moments, measure, watch, windows_of
from herdgraph.cli import main
from herdgraph.errors import HerdError
from herdgraph.export.block_format import BlockCodes, BlockFormat, in_blocks
from herdgraph.export.gptq import compensated, factor
from herdgraph.export.moments import MomentsFile
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.recipes import RECIPES
from herdgraph.export.rotation import RotatedCheckpoint
from herdgraph.export.verify import fidelity
from herdgraph.export.weights import Weight
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.herd import Llama4
from herdgraph.model.presets import TINY
from herdgraph.runtimes import Engine
from safetensors.torch import load_file

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
    codes, scales, zeros = compensated(rows, factor(x.T @ x), LAYOUT)
    assert codes.min() >= 0
    assert codes.max() <= 15
    found = ((codes - zeros[..., None]) * scales[..., None]).flatten(1)
    plain = torch.from_numpy(LAYOUT.quantise(in_blocks(rows.numpy(), 16)).values()).flatten(1)
    errors = [float(((values - rows) @ x.T).square().sum()) for values in (found, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_white_data_gives_nearest_codes_of_the_first_column() -> None:
    rows = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    codes, scales, zeros = compensated(rows, factor(torch.eye(32)), LAYOUT)
    plain = LAYOUT.quantise(in_blocks(rows.numpy(), 16))
    np.testing.assert_array_equal(codes[..., 0].numpy(), plain.codes[..., 0])
    np.testing.assert_allclose(scales.numpy(), plain.scales, rtol=1e-5)
    np.testing.assert_array_equal(zeros.numpy(), plain.zeros)


def test_inputs_never_seen_do_not_break_the_factor() -> None:
    x = _data()
    x[:, 5:20] = 0
    codes, scales, _ = compensated(torch.randn(3, 64), factor(x.T @ x), LAYOUT)
    assert codes.isfinite().all()
    assert scales.isfinite().all()
    assert factor(torch.zeros(16, 16)).isfinite().all()


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


def test_moments_are_those_of_the_inputs(checkpoint: Path) -> None:
    with open_checkpoint(checkpoint) as source:
        decoder = Llama4.from_checkpoint(RotatedCheckpoint(source)).eval().decoder
    moments, seen = Moments(), []
    watch(decoder, moments, RECIPES["int4"])
    experts = decoder.layers[1].feed_forward.experts
    experts.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    with torch.inference_mode():
        decoder(torch.tensor([herds.tokens(50)]))
    x_TD, logits_TE = seen[0]
    name = "layers.1.feed_forward.experts.gate_up_proj"
    best = logits_TE.max(-1)
    for expert in range(4):
        rows = (x_TD * torch.sigmoid(best.values)[:, None])[best.indices == expert]
        torch.testing.assert_close(moments.sums[name][expert], rows.T @ rows, atol=1e-3, rtol=1e-4)
    shared = moments.sums["layers.1.feed_forward.shared_expert.up_proj.weight"]
    torch.testing.assert_close(shared, x_TD.T @ x_TD, atol=1e-3, rtol=1e-4)
    assert not any("self_attn" in name or "router" in name or "lm_head" in name for name in moments.sums)
    lent = moments.shared_among_experts()[name]
    torch.testing.assert_close(lent, moments.sums[name] + 0.05 * moments.sums[name].sum(0), atol=1e-4, rtol=1e-4)


def test_a_bundle_rounded_by_data_is_closer_on_it(checkpoint: Path, tmp_path: Path) -> None:
    logits = {}
    with open_checkpoint(checkpoint) as source:
        measure(source, RECIPES["int4"], windows_of(source, [TEXT]), tmp_path / "moments.safetensors")
        for name, recipe, calibration in (
            ("exact", "fp32", None), ("plain", "int4", None), ("gptq", "int4", tmp_path / "moments.safetensors"),
        ):
            build_bundle(source, tmp_path / name, recipe=recipe, calibration=calibration)
            engine = Engine.load(tmp_path / name, threads=1)
            ids = engine.processor.tokenizer.encode(TEXT)[:400]
            logits[name] = engine.prefill(engine.new_sequence(), ids, all_positions=True)
    plain, gptq = (fidelity(logits["exact"], logits[name]) for name in ("plain", "gptq"))
    assert gptq.mean_kl < 0.7 * plain.mean_kl


def test_names_of_graphs_find_their_moments(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    with open_checkpoint(checkpoint) as source:
        measure(source, RECIPES["int4"], windows_of(source, [TEXT]), path)
        file = MomentsFile.open(path, source.fingerprint())
    stored = load_file(path)
    joined = "layers.0.feed_forward.gate_proj.weight.T+layers.0.feed_forward.up_proj.weight.T"
    expert = "layers.1.feed_forward.experts/then_24/then_4/expert_2.down_proj"
    for name, wanted in ((joined, stored["layers.0.feed_forward.gate_proj.weight"]),
                         (expert, stored["layers.1.feed_forward.experts.down_proj"][2])):
        found = file.of(name)
        assert found is not None
        torch.testing.assert_close(found, wanted)
    assert file.of("layers.0.self_attn.q_proj.weight.T") is None


def test_a_calibration_for_another_recipe_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Weights that it does not know would be rounded to nearest, and nobody would notice."""
    path = tmp_path / "moments.safetensors"
    with open_checkpoint(checkpoint) as source:
        measure(source, RECIPES["int8"], windows_of(source, [TEXT]), path)
        with pytest.raises(HerdError, match=r"says nothing of .* calibrate --recipe int4"):
            build_bundle(source, tmp_path / "bundle", recipe="int4", calibration=path)
    assert not (tmp_path / "bundle").exists()


def test_the_command_and_its_refusals(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    output = tmp_path / "moments.safetensors"

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, ["calibrate", *map(str, arguments)])
        return result.output if result.exit_code else ""

    assert run(checkpoint, "-o", output, "--data", tmp_path / "text.txt") == ""
    assert output.is_file()
    (tmp_path / "short.txt").write_text("too short")
    assert "at least 512 are needed" in run(checkpoint, "-o", output, "--data", tmp_path / "short.txt")
    assert "cannot be read as text" in run(checkpoint, "-o", output, "--data", tmp_path / "none.txt")
    assert "is not a directory" in run(checkpoint, "-o", tmp_path / "none" / "m.safetensors")
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(HerdError, match="another checkpoint"):
        MomentsFile.open(output, "0" * 64)
    with pytest.raises(HerdError, match="herdgraph calibrate"):
        MomentsFile.open(tmp_path / "text.txt", "0" * 64)
