"""FP8 in safetensors: every spelling and shape of a scale against a dequantisation written here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from herdgraph.errors import HerdError
from herdgraph.model.checkpoint import open_checkpoint
from support import herds

CONFIG = herds.variant()
LINEAR = "layers.0.self_attn.q_proj"
EXPERTS = "layers.1.feed_forward.experts"
INDICES = (None, 0, 3, slice(1, 3), slice(0, 0))
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("full")
    herds.save(CONFIG, directory)
    return directory


def _write(saved: Path, directory: Path, changed: Tensors, *removed: str) -> Path:
    """The saved checkpoint with some tensors exchanged; names are canonical."""
    tensors = load_file(saved / "model.safetensors")
    for name in removed:
        del tensors[f"model.{name}"]
    tensors |= {f"model.{name}": value for name, value in changed.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text((saved / "config.json").read_text())
    return directory


def _fp8(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (value / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def _full(saved: Path, name: str) -> torch.Tensor:
    return load_file(saved / "model.safetensors")[f"model.{name}"]


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (64,), (64, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(suffix: str, shape: tuple[int, ...], dtype: torch.dtype, saved: Path, tmp_path: Path) -> None:
    full = _full(saved, f"{LINEAR}.weight")
    per_row = 64 in shape
    scale = (full.abs().amax(1) / 448 if per_row else full.abs().max() / 448).to(dtype)
    column = scale.float().reshape(-1, 1)
    stored = _fp8(full, column)
    changed = {f"{LINEAR}.weight": stored, f"{LINEAR}.{suffix}": scale.reshape(shape)}
    with open_checkpoint(_write(saved, tmp_path, changed)) as checkpoint:
        expected = stored.to(torch.float32) * column
        for index in INDICES:
            part = expected if index is None else expected[index]
            assert torch.equal(checkpoint.read(f"{LINEAR}.weight", index), part)
        assert checkpoint.tensors[f"{LINEAR}.weight"].dtype == torch.float32
    torch.testing.assert_close(expected, full, atol=0.01, rtol=0.07)


@pytest.mark.parametrize("suffix", ["_scale", "_weight_scale"])
@pytest.mark.parametrize("shape", [(), (4,), (4, 1, 1), (1, 1, 96), (4, 1, 96), (4, 64, 1)])
def test_fused_experts(suffix: str, shape: tuple[int, ...], saved: Path, tmp_path: Path) -> None:
    """Scales of one tensor, each expert, each output, each output or input of each expert."""
    name = f"{EXPERTS}.gate_up_proj"
    full = _full(saved, name)
    scale = 0.001 + torch.rand(shape) / 448
    column = scale.reshape(4, 1, 1) if shape == (4,) else scale
    stored = _fp8(full, column)
    with open_checkpoint(_write(saved, tmp_path, {name: stored, f"{name}{suffix}": scale})) as checkpoint:
        expected = stored.to(torch.float32) * column
        for index in INDICES:
            part = expected if index is None else expected[index]
            assert torch.equal(checkpoint.read(name, index), part)


def test_unfused_experts_with_own_scales(saved: Path, tmp_path: Path) -> None:
    """As Meta's FP8 Maverick is published: [out, in] and bf16 [out, 1] for every matrix of every expert."""
    fused = {"gate_up_proj": _full(saved, f"{EXPERTS}.gate_up_proj"), "down_proj": _full(saved, f"{EXPERTS}.down_proj")}
    changed, expected = {}, {}
    for expert in range(4):
        gate, up = fused["gate_up_proj"][expert].chunk(2, dim=-1)
        for kind, matrix in (("gate", gate.T), ("up", up.T), ("down", fused["down_proj"][expert].T)):
            scale = (matrix.abs().amax(1, keepdim=True) / 448).bfloat16()
            stored, prefix = _fp8(matrix, scale.float()), f"{EXPERTS}.{expert}.{kind}_proj"
            changed |= {f"{prefix}.weight": stored.contiguous(), f"{prefix}.weight_scale": scale,
                        f"{prefix}.input_scale": torch.tensor(0.25)}
            expected[expert, kind] = (stored.float() * scale.float()).T
    directory = _write(saved, tmp_path, changed, f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj")
    with open_checkpoint(directory) as checkpoint:
        for expert in range(4):
            gate_up = torch.cat((expected[expert, "gate"], expected[expert, "up"]), dim=-1)
            assert torch.equal(checkpoint.read(f"{EXPERTS}.gate_up_proj", expert), gate_up)
            assert torch.equal(checkpoint.read(f"{EXPERTS}.down_proj", expert), expected[expert, "down"])
            assert torch.equal(checkpoint.read(f"{EXPERTS}.gate_up_proj")[expert], gate_up)
        assert len(checkpoint.input_scales) == 12
        assert checkpoint.input_scales[f"{EXPERTS}.2.up_proj.weight"].read() == 0.25


def test_input_and_cache_scales(saved: Path, tmp_path: Path) -> None:
    changed = {
        f"{LINEAR}.input_scale": torch.tensor([2.0]), f"{EXPERTS}.gate_up_proj_input_scale": torch.tensor(3.0),
        "layers.0.self_attn.k_proj.k_scale": torch.ones(1), "layers.0.self_attn.v_proj.output_scale": torch.ones(1),
    }
    with open_checkpoint(_write(saved, tmp_path, changed)) as checkpoint:
        scales = {name: lazy.read().item() for name, lazy in checkpoint.input_scales.items()}
        assert scales == {f"{LINEAR}.weight": 2.0, f"{EXPERTS}.gate_up_proj": 3.0}


E4M3 = torch.zeros(64, 64).to(torch.float8_e4m3fn)
FAULTS: dict[str, tuple[Tensors, str]] = {
    "no scale": ({f"{LINEAR}.weight": E4M3}, r"q_proj.weight is FP8 and has no scale beside it"),
    "no weight": ({"layers.9.q_proj.weight_scale": torch.ones(1)}, r"has a scale for layers.9.q_proj.weight, but not"),
    "blocks": ({f"{LINEAR}.weight": E4M3, f"{LINEAR}.weight_scale_inv": torch.ones(2, 2)},
               r"the scale of .+q_proj.weight has shape \[2, 2\], which does not fit \[64, 64\]"),
    "experts and outputs without the axis between": (
        {f"{EXPERTS}.gate_up_proj_scale": torch.ones(4, 96)}, r"has shape \[4, 96\], which does not fit \[4, 64, 96\]"),
    "packed int4": ({f"{LINEAR}.weight": torch.zeros(64, 8, dtype=torch.int32)}, "is stored as int32; floats and FP8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_open_refuses_wrong_scales(fault: str, saved: Path, tmp_path: Path) -> None:
    changed, message = FAULTS[fault]
    with pytest.raises(HerdError, match=message) as caught:
        open_checkpoint(_write(saved, tmp_path, changed))
    assert "\n" not in str(caught.value)
