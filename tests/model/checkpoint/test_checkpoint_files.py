"""Hugging Face checkpoints, the edges: what exactly is read, indices that lie, hashes, and memory while writing."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Llama4ForCausalLM

from herdgraph.errors import HerdError
from herdgraph.model.checkpoint import Checkpoint, TensorInfo, expected_tensors, open_checkpoint, save_checkpoint
from herdgraph.model.checkpoint.names import canonical_name, stored_name
from herdgraph.model.config.presets import TINY
from support import herds

TEXT = herds.variant()
EXPERTS = "layers.1.feed_forward.experts"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    herds.save(TEXT, directory, max_shard_size="100KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 3
    return directory


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    for path in sharded.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("config", [TEXT, TINY, herds.VARIANTS["moe-every-layer"], herds.VARIANTS["tied"]])
def test_tensors_match_transformers(config: herds.HerdConfig, tmp_path: Path) -> None:
    model = herds.save(config, tmp_path, max_shard_size="60KB")
    expected = {canonical_name(name): value for name, value in model.state_dict().items()}
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == config
        for name, shape in expected_tensors(config).items():
            assert checkpoint.tensors[name] == TensorInfo(name, shape, torch.float32)
            assert torch.equal(checkpoint.read(name), expected[name]), name
        with pytest.raises(HerdError, match="has no tensor nothing"):
            checkpoint.read("nothing")
        with pytest.raises(ValueError, match="without a step"):
            checkpoint.read("norm.weight", slice(0, 8, 2))


def test_stored_names_invert() -> None:
    for config in (TINY, TEXT):
        names = {stored_name(name, config): name for name in expected_tensors(config)}
        assert len(names) == len(expected_tensors(config))
        assert all(canonical_name(stored) == name for stored, name in names.items())
        assert set(names) == set(herds.reference(config).state_dict())


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of weights, read by read."""
    counts: list[int] = []
    real = np.fromfile

    def counting(path: Path, dtype: type, count: int, offset: int) -> np.ndarray:
        counts.append(count)
        return real(path, dtype, count, offset=offset)

    monkeypatch.setattr(np, "fromfile", counting)
    return counts


def test_read_touches_only_wanted_bytes(sharded: Path, bytes_read: list[int]) -> None:
    with open_checkpoint(sharded) as checkpoint:
        checkpoint.fingerprint()
        assert bytes_read == []
        checkpoint.read(f"{EXPERTS}.gate_up_proj", 2)
        checkpoint.read("embed_tokens.weight", slice(10, 13))
        checkpoint.read("norm.weight")
    assert bytes_read == [64 * 96 * 4, 3 * 64 * 4, 64 * 4]


def test_read_one_expert_of_many_files(copy: Path, bytes_read: list[int]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for path in copy.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (copy / INDEX).unlink()
    for name in [name for name in tensors if ".experts." in name]:
        value, prefix = tensors.pop(name), name.rpartition(".")[0]
        kinds = ("gate", "up") if name.endswith("gate_up_proj") else ("down",)
        for expert, matrix in enumerate(value):
            for kind, part in zip(kinds, matrix.chunk(len(kinds), dim=-1), strict=True):
                tensors[f"{prefix}.{expert}.{kind}_proj.weight"] = part.T.contiguous()
    save_file(tensors, copy / "model.safetensors")
    with open_checkpoint(copy) as checkpoint:
        checkpoint.read(f"{EXPERTS}.gate_up_proj", 3)
        checkpoint.read(f"{EXPERTS}.down_proj", 0)
    assert bytes_read == [64 * 48 * 4] * 3

    tensors[f"model.{EXPERTS}.2.up_proj.weight"] = torch.zeros(47, 64)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(HerdError, match=r"experts.2.up_proj has shape \[47, 64\], that of expert 0 has \[48, 64\]"):
        open_checkpoint(copy)


def test_read_owns_its_memory(copy: Path) -> None:
    with open_checkpoint(copy) as checkpoint:
        value = checkpoint.read("embed_tokens.weight", slice(0, 2))
        assert value.untyped_storage().nbytes() == value.nbytes
        before = checkpoint.fingerprint()
        value.zero_()
        assert checkpoint.read("embed_tokens.weight", 0).abs().sum() > 0
        assert checkpoint.fingerprint() == before


def test_fingerprint_changes_with_content(copy: Path) -> None:
    """Weights, names and configuration each change it."""
    def of(directory: Path) -> str:
        with open_checkpoint(directory) as checkpoint:
            return checkpoint.fingerprint()

    first = of(copy)
    shard = sorted(copy.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    second = of(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert len({first, second, of(copy)}) == 3


def _edit(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def _first(directory: Path) -> Path:
    return min(directory.glob("*.safetensors"))


def _header(directory: Path, length: int, text: bytes) -> None:
    _first(directory).write_bytes(length.to_bytes(8, "little") + text)


def _cut(directory: Path, count: int) -> None:
    _first(directory).write_bytes(_first(directory).read_bytes()[:count])


def _typed(directory: Path, dtype: str, size: int) -> None:
    text = json.dumps({"x": {"dtype": dtype, "shape": [size], "data_offsets": [0, size]}}).encode()
    _header(directory, len(text), text + bytes(size))


NORM = "model.layers.2.input_layernorm.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "entry missing in the index": (lambda d: _edit(d, lambda m: m.pop(NORM)),
                                   rf"holds {NORM}, which {INDEX} does not list there: download both again"),
    "entry without a tensor": (lambda d: _edit(d, lambda m: m.update({"model.x": m[NORM]})),
                               rf"does not hold model.x, which {INDEX} lists there"),
    "shard missing": (lambda d: _first(d).unlink(), r"model-00001-of-\d+.safetensors is missing, .+ names it"),
    "cut off": (lambda d: _cut(d, -7), r"its header describes (\d+) bytes, the file has \d+; get or write it again"),
    "header cut off": (lambda d: _cut(d, 40), r"its header takes \d+ bytes, the file has 40; get or write it again"),
    "header not JSON": (lambda d: _header(d, 4, b"nope"), "its header cannot be read as JSON"),
    "header a list": (lambda d: _header(d, 2, b"[]"), "its header is not a JSON object"),
    "entry of another form": (lambda d: _header(d, 7, b'{"a":1}'), "is damaged or cut off"),
    "length without header": (lambda d: _header(d, 1 << 60, b""), "its header takes 1152921504606846976 bytes"),
    "unknown type": (lambda d: _typed(d, "F8_E8M0", 4), "a tensor of type F8_E8M0, which is not supported"),
    "offsets that lie": (lambda d: _typed(d, "F32", 5), "is damaged or cut off"),
    "no directory": (lambda d: d.rename(d.with_name("moved")), "does not exist: give a checkpoint"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_open_refuses_damaged_files(fault: str, copy: Path) -> None:
    damage, message = FAULTS[fault]
    damage(copy)
    with pytest.raises(HerdError, match=message) as caught:
        open_checkpoint(copy)
    assert "\n" not in str(caught.value)


def test_open_refuses_tensor_under_two_names(copy: Path) -> None:
    save_file({f"language_model.{NORM}": torch.ones(64)}, copy / "more.safetensors")
    _edit(copy, lambda m: m.update({f"language_model.{NORM}": "more.safetensors"}))
    with pytest.raises(HerdError, match=rf"layers.2.input_layernorm.weight twice, once more as language_model.{NORM}"):
        open_checkpoint(copy)


def test_read_of_shrunk_file(copy: Path) -> None:
    with open_checkpoint(copy) as checkpoint:
        _cut(copy, 2000)
        with pytest.raises(HerdError, match="became shorter while it was read"):
            [checkpoint.read(name) for name in checkpoint.tensors]


def test_open_ignores_buffers_and_tied_head(tmp_path: Path) -> None:
    config = herds.VARIANTS["tied"]
    herds.save(config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for name in ("model.rotary_emb.inv_freq", "model.layers.0.self_attn._extra_state", "rope.freqs"):
        tensors[name] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(expected_tensors(config))


def _save(checkpoint: Checkpoint, directory: Path, **options: int) -> None:
    tensors = ((name, checkpoint.read(name)) for name in checkpoint.tensors)
    save_checkpoint(directory, checkpoint.config, tensors, **options)


def test_save_holds_one_shard(sharded: Path, tmp_path: Path) -> None:
    alive, peak = 0, 0

    def released(size: int) -> None:
        nonlocal alive
        alive -= size

    def tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal alive, peak
        for name in checkpoint.tensors:
            value = checkpoint.read(name)
            alive += value.nbytes
            peak = max(peak, alive)
            weakref.finalize(value.untyped_storage(), released, value.nbytes)
            yield name, value
            del value

    with open_checkpoint(sharded) as checkpoint:
        infos = checkpoint.tensors.values()
        largest = max(int(np.prod(info.shape)) * info.dtype.itemsize for info in infos)
        save_checkpoint(tmp_path / "out", TEXT, tensors(checkpoint), shard_bytes=2 * largest)
    assert 0 < peak <= 3 * largest
    assert alive <= largest


def test_save_of_views(tmp_path: Path) -> None:
    untied = herds.variant()
    shapes = expected_tensors(untied)
    table = torch.randn(512, 64)
    norms = torch.randn(9, 64)
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    given |= {"embed_tokens.weight": table, "lm_head.weight": table, "norm.weight": norms[3]}
    given["layers.0.self_attn.q_proj.weight"] = torch.randn(64, 64).T
    save_checkpoint(tmp_path / "out", untied, given.items())
    with open_checkpoint(tmp_path / "out") as checkpoint:
        for name, value in given.items():
            assert torch.equal(checkpoint.read(name), value), name


def test_save_keeps_logits(sharded: Path, tmp_path: Path) -> None:
    with open_checkpoint(sharded) as checkpoint:
        _save(checkpoint, tmp_path / "single")
        _save(checkpoint, tmp_path / "shards", shard_bytes=50_000)
    ids = herds.tokens(20)
    models = [Llama4ForCausalLM.from_pretrained(d, dtype=torch.float32).eval()
              for d in (sharded, tmp_path / "single", tmp_path / "shards")]
    first, *others = (herds.logits(model, ids) for model in models)
    assert all(torch.equal(first, other) for other in others)


def test_save_on_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("herdgraph.model.checkpoint.tensors.write.save_file", full)
    tensors = ((name, torch.zeros(shape)) for name, shape in expected_tensors(TEXT).items())
    with pytest.raises(HerdError, match="failed: No space left on device; nothing was left behind"):
        save_checkpoint(tmp_path / "out", TEXT, tensors)
    assert not any(tmp_path.iterdir())


def test_save_copies_processor_files(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("processor_files") / "out"
    herds.write_processor(copy)
    with open_checkpoint(copy) as checkpoint:
        processor_files = {path.name: path for path in checkpoint.processor_files()}
        assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= processor_files.keys()
        tensors = [(name, checkpoint.read(name)) for name in checkpoint.tensors]
        save_checkpoint(out, checkpoint.config, tensors, processor_files={**processor_files, "note.txt": b"hello"})
        with pytest.raises(HerdError, match="exists already"):
            save_checkpoint(out, checkpoint.config, tensors)
        save_checkpoint(out, replace(checkpoint.config), tensors, overwrite=True)
    assert not (out / "note.txt").exists()
