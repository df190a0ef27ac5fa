"""Hugging Face checkpoints: every layout gives the same tensors, nothing is read early, damage is one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

from herdgraph.errors import HerdError
from herdgraph.model.checkpoint import open_checkpoint, save_checkpoint
from herdgraph.model.checkpoint.huggingface import canonical_name, stored_name
from herdgraph.model.config import to_hf
from herdgraph.model.config.names import expected_tensors
from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.model import Llama4
from support import herds

TEXT = herds.variant()
EXPERTS = "layers.1.feed_forward.experts"


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    """Canonical tensors of the seeded text model."""
    return {canonical_name(name): value for name, value in herds.reference(TEXT).state_dict().items()}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    herds.save(TEXT, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def _rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _assert_equal(directory: Path, reference: dict[str, torch.Tensor], **tolerance: float) -> None:
    with open_checkpoint(directory) as checkpoint:
        assert set(checkpoint.tensors) == set(expected_tensors(checkpoint.config))
        for name, lazy in checkpoint.tensors.items():
            value = checkpoint.read(name)
            assert value.shape == lazy.shape
            assert value.dtype == lazy.dtype
            torch.testing.assert_close(value.float(), reference[name].float(), **tolerance or {"atol": 0, "rtol": 0})


@pytest.mark.parametrize("shards", [None, "40KB"])
def test_single_and_sharded(shards: str | None, tmp_path: Path, reference: dict[str, torch.Tensor]) -> None:
    herds.save(TEXT, tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == bool(shards)
    _assert_equal(tmp_path, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, directory: Path, reference: dict[str, torch.Tensor]) -> None:
    _rewrite(directory, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    _assert_equal(directory, {name: value.to(dtype) for name, value in reference.items()})


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "language_model.", ""])
def test_prefixes(prefix: str, directory: Path, reference: dict[str, torch.Tensor]) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {prefix + canonical_name(name): tensors.pop(name) for name in list(tensors)}
        tensors.update(renamed)

    _rewrite(directory, rename)
    _assert_equal(directory, reference)


def _unfuse(tensors: dict[str, torch.Tensor], quantise: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Experts as one nn.Linear each, as quantised checkpoints store them."""
    for name in [name for name in tensors if ".experts." in name]:
        value, prefix = tensors.pop(name), name.rpartition(".")[0]
        for expert, matrix in enumerate(value):
            parts = {"down": matrix}
            if name.endswith("gate_up_proj"):
                parts = dict(zip(("gate", "up"), matrix.chunk(2, dim=-1), strict=True))
            for kind, part in parts.items():
                for suffix, tensor in quantise(part.T.contiguous()).items():
                    tensors[f"{prefix}.{expert}.{kind}_proj.{suffix}"] = tensor


def test_unfused_experts(directory: Path, reference: dict[str, torch.Tensor]) -> None:
    _rewrite(directory, lambda tensors: _unfuse(tensors, lambda value: {"weight": value}))
    _assert_equal(directory, reference)
    with open_checkpoint(directory) as checkpoint:
        for name in (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"):
            assert torch.equal(checkpoint.read(name, 2), reference[name][2])
            assert torch.equal(checkpoint.read(name, slice(1, 3)), reference[name][1:3])


def _per_channel(value: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = value.abs().amax(1, keepdim=True) / 448
    return {"weight": (value / scale).to(torch.float8_e4m3fn), "weight_scale": scale.to(torch.bfloat16),
            "input_scale": torch.tensor(0.5)}


def _per_tensor(value: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = value.abs().max() / 448
    return {"weight": (value / scale).to(torch.float8_e4m3fn), "weight_scale": scale.reshape(1)}


@pytest.mark.parametrize("quantise", [_per_channel, _per_tensor])
def test_fp8_experts(
    quantise: Callable[[torch.Tensor], dict[str, torch.Tensor]], directory: Path, reference: dict[str, torch.Tensor]
) -> None:
    _rewrite(directory, lambda tensors: _unfuse(tensors, quantise))
    with open_checkpoint(directory) as checkpoint:
        stored = load_file(directory / "model.safetensors")
        gate = "model.layers.1.feed_forward.experts.3.gate_proj"
        expected = stored[f"{gate}.weight"].float() * stored[f"{gate}.weight_scale"].float()
        found = checkpoint.read(f"{EXPERTS}.gate_up_proj", 3)
        assert torch.equal(found[:, :48], expected.T)
        torch.testing.assert_close(found, reference[f"{EXPERTS}.gate_up_proj"][3], atol=0.02, rtol=0.07)
        assert bool(checkpoint.input_scales) == (quantise is _per_channel)


def test_fp8_fused_with_broadcast_scale(directory: Path, reference: dict[str, torch.Tensor]) -> None:
    name = f"model.{EXPERTS}.gate_up_proj"

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors[name].abs().amax(1, keepdim=True) / 448
        tensors[f"{name}_scale"] = scale
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)

    _rewrite(directory, quantise)
    with open_checkpoint(directory) as checkpoint:
        for index in (None, 2, slice(1, 3)):
            expected = reference[f"{EXPERTS}.gate_up_proj"]
            expected = expected if index is None else expected[index]
            found = checkpoint.read(f"{EXPERTS}.gate_up_proj", index)
            torch.testing.assert_close(found, expected, atol=0.02, rtol=0.07)


@pytest.mark.parametrize("multimodal", [False, True])
def test_save_round_trips_through_transformers(multimodal: bool, tmp_path: Path) -> None:
    config = TINY if multimodal else TEXT
    theirs = herds.save(config, tmp_path / "theirs")
    with open_checkpoint(tmp_path / "theirs") as source:
        tensors = ((name, source.read(name)) for name in source.tensors)
        files = {"note.txt": b"x"}
        save_checkpoint(tmp_path / "ours", source.config, tensors, processor_files=files, shard_bytes=40_000)
        first = source.fingerprint()
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    kind = Llama4ForConditionalGeneration if multimodal else Llama4ForCausalLM
    loaded = kind.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    ids = herds.tokens(20)
    torch.testing.assert_close(herds.logits(loaded.eval(), ids), herds.logits(theirs, ids), atol=1e-6, rtol=0)
    with open_checkpoint(tmp_path / "ours") as ours:
        assert ours.config == config
        assert ours.fingerprint() == ours.fingerprint() != first
        with torch.inference_mode():
            logits = Llama4.from_checkpoint(ours)(torch.tensor([ids]))[0]
    torch.testing.assert_close(logits, herds.logits(theirs, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight", "layers.0.self_attn.q_proj.weight",
                                  "vision_model.class_embedding", "multi_modal_projector.linear_1.weight"])
def test_stored_names_invert(name: str) -> None:
    for config in (TINY, TEXT):
        assert canonical_name(stored_name(name, config)) == name


def test_save_refusals(tmp_path: Path) -> None:
    shapes = expected_tensors(TEXT)
    every = [(name, torch.zeros(shape)) for name, shape in shapes.items()]
    cases = {
        "and 0 more tensors were not given": every[:-1],
        "is not a tensor of this configuration": [*every, ("other", torch.zeros(1))],
        "was given twice": [*every, every[0]],
        r"has shape \[1\]": [(every[0][0], torch.zeros(1))],
    }
    for message, tensors in cases.items():
        with pytest.raises(HerdError, match=message):
            save_checkpoint(tmp_path / "out", TEXT, tensors)
        assert not any(tmp_path.iterdir())


def test_open_reads_no_weights(tmp_path: Path) -> None:
    """A sparse file of 40 GB opens at once."""
    header: dict[str, object] = {}
    end, factor = 0, 40
    config = herds.variant(num_experts=1 << 21)
    for name, shape in expected_tensors(config).items():
        size = 2 * int(torch.tensor(shape).prod())
        header[f"model.{name}" if not name.startswith("lm_head") else name] = {
            "dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    assert end > factor * 1_000_000_000
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read(f"{EXPERTS}.down_proj", 1_000_000).shape == (48, 64)


def _truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _edit_index(directory: Path, **weight_map: str) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


NORM = "model.layers.2.input_layernorm.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "missing shard": (lambda d: _edit_index(d, a="model-00002.safetensors"), "model-00002.safetensors is missing"),
    "path in index": (lambda d: _edit_index(d, a="../x.safetensors"), "outside of the checkpoint: refused"),
    "broken index": (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "holds a list, a JSON object is"),
    "deep index": (lambda d: (d / "model.safetensors.index.json").write_text("[" * 200_000), "cannot be read as JSON"),
    "empty index": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "is not a safetensors index"),
    "odd index": (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}'),
                  "is not a safetensors index"),
    "truncated": (_truncate, "is damaged or cut off"),
    "not safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"nonsense" * 9), "is damaged or cut off"),
    "empty file": (lambda d: (d / "model.safetensors").write_bytes(b""), "is damaged or cut off"),
    "wrong shape": (lambda d: _rewrite(d, lambda t: t.update({NORM: torch.zeros(3)})),
                    r"layers.2.input_layernorm.weight has shape \[3\], its config gives \[64\]"),
    "unknown tensor": (lambda d: _rewrite(d, lambda t: t.update({"model.extra": torch.zeros(3)})),
                       "has a tensor extra that its config does not know"),
    "missing tensor": (lambda d: _rewrite(d, lambda t: t.pop(NORM)), "has no tensor layers.2.input_layernorm.weight"),
    "integer weight": (lambda d: _rewrite(d, lambda t: t.update({NORM: torch.zeros(64, dtype=torch.int8)})),
                       "is stored as int8"),
    "FP8 without scale": (lambda d: _rewrite(d, lambda t: t.update({NORM: torch.zeros(64).to(torch.float8_e4m3fn)})),
                          "is FP8 and has no scale"),
    "scale without weight": (lambda d: _rewrite(d, lambda t: t.update({"model.x_scale": torch.ones(1)})),
                             "has a scale for x, but not the tensor"),
    "scale of a wrong shape": (lambda d: _rewrite(d, lambda t: t.update({f"{NORM}_scale": torch.ones(5)})),
                               r"has shape \[5\], which does not fit \[64\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_open_refuses_broken_layouts(fault: str, directory: Path) -> None:
    damage, message = FAULTS[fault]
    damage(directory)
    with pytest.raises(HerdError, match=message) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)


def test_expert_without_a_matrix(directory: Path) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        _unfuse(tensors, lambda value: {"weight": value})
        del tensors["model.layers.1.feed_forward.experts.2.up_proj.weight"]

    _rewrite(directory, remove)
    with pytest.raises(HerdError, match=r"layers.1.feed_forward.experts.2 has no up_proj"):
        open_checkpoint(directory)
