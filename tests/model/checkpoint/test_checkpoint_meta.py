"""Meta's layout, written here from known weights: one and two ranks, fused and plain names, FP8, damage."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.checkpoint.meta.checkpoint import _load as load
from herdgraph.model.checkpoint.meta.checkpoint import _numbered as numbered
from herdgraph.model.checkpoint.meta.positions import resampled_positions
from herdgraph.model.checkpoint.tensors.lazy import MappedTensor
from herdgraph.model.llama4.model import Llama4
from herdgraph.runtimes import Engine
from support import herds
from support.meta_files import PARAMS, Tensors, canonical, rank_weights, write_meta


@pytest.mark.parametrize(("ranks", "fused"), [(1, True), (1, False), (2, True), (2, False)])
def test_tensors_match_source(ranks: int, fused: bool, tmp_path: Path) -> None:
    _, weights = canonical()
    write_meta(tmp_path, weights, ranks, fused=fused)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(weights)
        for name, expected in weights.items():
            assert torch.equal(checkpoint.read(name), expected), name
            middle = slice(1, max(2, len(expected) - 1))
            assert torch.equal(checkpoint.read(name, middle), expected[middle]), name
            for entry in (0, len(expected) // 2, len(expected) - 1):
                assert torch.equal(checkpoint.read(name, entry), expected[entry]), name


def test_logits_of_torch_and_bundle(tmp_path: Path) -> None:
    model, weights = canonical()
    write_meta(tmp_path / "meta", weights, ranks=2)
    ids = herds.tokens(50)
    expected = herds.logits(model, ids)
    with open_checkpoint(tmp_path / "meta") as checkpoint:
        with torch.inference_mode():
            torch.testing.assert_close(Llama4.from_checkpoint(checkpoint)(torch.tensor([ids]))[0], expected,
                                       atol=1e-4, rtol=0)
        build_bundle(checkpoint, tmp_path / "bundle")
    engine = Engine.load(tmp_path / "bundle", threads=1)
    found = engine.prefill(engine.new_sequence(), ids, all_positions=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)


ENCODER = "vision_embeddings.vision_encoder"
FAIRSCALE = "fairscale.nn.model_parallel"
LLAMA_MODELS = ("llama4.model", "llama4.moe", "llama4.ffn", "llama4.vision.embedding", "llama4.vision.encoder",
                "checkpoint")


class _Linear(nn.Linear):
    """fairscale's parallel layers on one rank."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, **_: object) -> None:
        super().__init__(inputs, outputs, bias=bias)


class _Embedding(nn.Embedding):
    def __init__(self, count: int, width: int, **_: object) -> None:
        super().__init__(count, width)


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Meta's own model and resharding code, on one rank: fairscale's layers replaced by torch's, ``cuda()`` by none."""
    stubs = {f"{FAIRSCALE}.{name}": ModuleType(name) for name in ("initialize", "layers", "mappings")}
    initialize, layers, mappings = stubs.values()
    vars(initialize).update(get_model_parallel_world_size=lambda: 1, get_model_parallel_rank=lambda: 0)
    vars(layers).update(ColumnParallelLinear=_Linear, RowParallelLinear=_Linear, VocabParallelEmbedding=_Embedding)
    vars(mappings).update(reduce_from_model_parallel_region=lambda value: value)
    parent = ModuleType(FAIRSCALE)
    vars(parent).update(initialize=initialize, layers=layers, mappings=mappings)
    nested = ModuleType("fairscale.nn")
    vars(nested).update(model_parallel=parent)
    root = ModuleType("fairscale")
    vars(root).update(nn=nested)
    for name, module in {"fairscale": root, "fairscale.nn": nested, FAIRSCALE: parent, **stubs}.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in LLAMA_MODELS:  # not left behind with stubs in them
        monkeypatch.delitem(sys.modules, f"llama_models.{name}", raising=False)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    yield SimpleNamespace(
        checkpoint=importlib.import_module("llama_models.checkpoint"),
        model=importlib.import_module("llama_models.llama4.model"),
        args=importlib.import_module("llama_models.llama4.args"),
        datatypes=importlib.import_module("llama_models.llama4.datatypes"),
    )
    for name in LLAMA_MODELS:
        sys.modules.pop(f"llama_models.{name}", None)


def _meta_model(meta: SimpleNamespace, stored: Tensors) -> nn.Module:
    model = meta.model.Transformer(meta.args.ModelArgs(**PARAMS, max_seq_len=64, max_batch_size=2))
    ignored = {name: value for name, value in stored.items() if not name.endswith("mlp._extra_state")}
    model.float().eval().load_state_dict(ignored, strict=True)
    return model


@pytest.mark.parametrize("fused", [True, False])
@torch.inference_mode()
def test_logits_match_llama_models(
    fused: bool, meta: SimpleNamespace, tmp_path: Path
) -> None:
    """llama-models' classes and load hooks read the file; text of one attention chunk, and tiles through the tower."""
    _, weights = canonical()
    write_meta(tmp_path, weights, fused=fused)
    theirs = _meta_model(meta, torch.load(tmp_path / "consolidated.00.pth", weights_only=True))
    with open_checkpoint(tmp_path) as checkpoint:
        ours = Llama4.from_checkpoint(checkpoint)
    ids = torch.tensor([herds.tokens(40)])
    logits = theirs(meta.datatypes.TransformerInput(tokens=ids, tokens_position=0)).logits
    torch.testing.assert_close(ours(ids), logits, atol=1e-4, rtol=0)
    pixels = torch.randn(2, 3, 28, 28)
    tower = theirs.vision_embeddings
    tower.vision_encoder.float()
    features = theirs.vision_projection(tower.vision_adapter(tower.vision_encoder(pixels[:, None, None])))
    torch.testing.assert_close(ours.vision(pixels), features.flatten(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_joined_ranks_match_llama_models(fused: bool, meta: SimpleNamespace) -> None:
    """``reshard_mp`` of the two ranks written here is the one rank written here, name by name."""
    _, weights = canonical()
    ranks = [meta.checkpoint.convert_moe_weights(rank_weights(weights, rank, 2, fused=fused), 4) for rank in range(2)]
    whole = meta.checkpoint.convert_moe_weights(rank_weights(weights, 0, 1, fused=fused), 4)
    joined = meta.checkpoint.reshard_mp(ranks, size=1, rank=0)
    assert set(joined) == set(whole)
    for name, value in whole.items():
        assert torch.equal(joined[name], value), name


@pytest.mark.filterwarnings("ignore:Default grid_sample")
def test_resampled_positions_match_llama_models(meta: SimpleNamespace, tmp_path: Path) -> None:
    _, weights = canonical()
    write_meta(tmp_path, weights)
    path = tmp_path / "consolidated.00.pth"
    stored = torch.load(path, weights_only=True)
    del stored[f"{ENCODER}.positional_embedding_vlm"]
    torch.save(stored | {f"{ENCODER}.positional_embedding": torch.randn(17, 32)}, path)
    theirs = meta.model.Transformer(meta.args.ModelArgs(**PARAMS, max_seq_len=64, max_batch_size=2)).float()
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=False)
    with open_checkpoint(tmp_path) as checkpoint:
        found = checkpoint.read("vision_model.positional_embedding_vlm")
    expected = theirs.vision_embeddings.vision_encoder.positional_embedding_vlm
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)


def _hook_by_hand(stored: torch.Tensor, side: int) -> torch.Tensor:
    """The reference's grid_sample written out: bilinear at (x - 1/2, y - 1/2), zeros outside, class token last."""
    grid = stored[1:].view(side, side, -1)
    out = torch.zeros(side, side, grid.shape[-1])
    for y in range(side):
        for x in range(side):
            for dy, dx in ((-1, -1), (-1, 0), (0, -1), (0, 0)):
                if y + dy >= 0 and x + dx >= 0:
                    out[y, x] += 0.25 * grid[y + dy, x + dx]
    return torch.cat((out.flatten(0, 1), stored[:1]))


def test_positional_embedding_is_resampled(tmp_path: Path) -> None:
    _, weights = canonical()
    write_meta(tmp_path, weights)
    stored = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    raw = torch.randn(17, 32)
    stored["vision_embeddings.vision_encoder.positional_embedding"] = raw
    torch.save(stored, tmp_path / "consolidated.00.pth")
    with open_checkpoint(tmp_path) as checkpoint:
        found = checkpoint.read("vision_model.positional_embedding_vlm")
    torch.testing.assert_close(found, _hook_by_hand(raw, 4), atol=1e-6, rtol=0)
    assert torch.equal(found, resampled_positions(raw, 4))


EXPERTS = "layers.1.feed_forward.experts"
STORED = {"w1": "moe_w_in_eD_F", "w3": "moe_w_swiglu_eD_F", "w2": "moe_w_out_eF_D"}


def _quantise(directory: Path, ranks: int) -> tuple[list[Tensors], list[Tensors]]:
    """What llama-models' quantize.py writes: routed experts per output row, scales by mapped name, [E, out]."""
    weights, scales = [], []
    for rank in range(ranks):
        path = directory / f"consolidated.{rank:02}.pth"
        stored, factors = torch.load(path, weights_only=True), {}
        for key, name in STORED.items():
            value_EON = stored[f"{EXPERTS}.{name}"].unflatten(0, (4, -1)).transpose(1, 2)
            scale_EO = value_EON.abs().amax(-1) / 448
            quantised = (value_EON / scale_EO[..., None]).to(torch.float8_e4m3fn).transpose(1, 2).flatten(0, 1)
            factors[f"{EXPERTS}.{key}"] = scale_EO
            stored[f"{EXPERTS}.{name}"] = nn.Parameter(quantised.contiguous())
        torch.save(stored, path)
        torch.save(factors, directory / f"fp8_scales_{rank}.pt")
        weights.append(stored)
        scales.append(factors)
    return weights, scales


@pytest.mark.parametrize("ranks", [1, 2])
def test_fp8_mixed(ranks: int, tmp_path: Path) -> None:
    _, weights = canonical()
    write_meta(tmp_path, weights, ranks)
    stored, scales = _quantise(tmp_path, ranks)

    def dequantised(key: str, expert: int) -> list[torch.Tensor]:
        """Each rank's matrix of one expert, [in, out]."""
        matrices = [rank[f"{EXPERTS}.{STORED[key]}"].detach().float().unflatten(0, (4, -1))[expert] for rank in stored]
        return [m * rank[f"{EXPERTS}.{key}"][expert] for m, rank in zip(matrices, scales, strict=True)]

    with open_checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint.weight_files) == 2 * ranks
        for expert in range(4):
            gate_up = checkpoint.read(f"{EXPERTS}.gate_up_proj", expert)
            assert torch.equal(gate_up, torch.cat(dequantised("w1", expert) + dequantised("w3", expert), -1))
            down = checkpoint.read(f"{EXPERTS}.down_proj", expert)
            assert torch.equal(down, torch.cat(dequantised("w2", expert), 0))
        for name in ("gate_up_proj", "down_proj"):
            whole = checkpoint.read(f"{EXPERTS}.{name}")
            assert not whole.requires_grad
            assert whole.dtype == checkpoint.tensors[f"{EXPERTS}.{name}"].dtype == torch.float32
            torch.testing.assert_close(whole, weights[f"{EXPERTS}.{name}"], atol=0.01, rtol=0.07)


def test_fp8_faults(tmp_path: Path) -> None:
    _, weights = canonical()
    write_meta(tmp_path, weights, 2)
    _, scales = _quantise(tmp_path, 2)
    torch.save(scales[1] | {f"{EXPERTS}.w2": torch.ones(4, 7)}, tmp_path / "fp8_scales_1.pt")
    with pytest.raises(HerdError, match=r"moe_w_out_eF_D has shape \[4, 1, 7\], which does not fit \[4, 44, 64\]"):
        open_checkpoint(tmp_path)
    torch.save({}, tmp_path / "fp8_scales_1.pt")
    with pytest.raises(HerdError, match=r"moe_w_in_eD_F is FP8 and fp8_scales_\*.pt has no layers.1.+w1"):
        open_checkpoint(tmp_path)
    (tmp_path / "fp8_scales_1.pt").unlink()
    with pytest.raises(HerdError, match="2 weight files and 1 fp8_scales files"):
        open_checkpoint(tmp_path)
    (tmp_path / "fp8_scales_0.pt").unlink()
    with pytest.raises(HerdError, match=r"is FP8 and fp8_scales_\*.pt has no"):
        open_checkpoint(tmp_path)


def test_rank_files_are_numbered(tmp_path: Path) -> None:
    for rank in range(12):
        (tmp_path / f"fp8_scales_{rank}.pt").touch()
    assert [path.stem for path in numbered(tmp_path, "fp8_scales_*.pt")] == [f"fp8_scales_{i}" for i in range(12)]
    (tmp_path / "fp8_scales_4.pt").unlink()
    with pytest.raises(HerdError, match=r"has no fp8_scales_\*.pt of rank 4, its last rank is 11"):
        numbered(tmp_path, "fp8_scales_*.pt")


def _mapped_megabytes() -> float:
    """Pages of files that this process has resident."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux")
def test_read_leaves_nothing_resident(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(64, 1 << 18)}, tmp_path / "x.pth")  # 64 MB
    content = load(tmp_path / "x.pth")
    before = _mapped_megabytes()
    lazy = MappedTensor(content["x"])
    for index in range(64):
        assert lazy.read(index).sum() == 1 << 18
    assert lazy.read(slice(0, 64)).sum() == 1 << 24
    assert _mapped_megabytes() - before < 8


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_open_refuses_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "meta"
    _, weights = canonical()
    write_meta(directory, weights, 2)
    second = directory / "consolidated.01.pth"
    content = second.read_bytes()

    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(HerdError, match=r"consolidated.01.pth is damaged or cut off"):
        open_checkpoint(directory)
    torch.save({"x": _Evil()}, second)
    with pytest.raises(HerdError, match="holds more than tensors and was not loaded"):
        open_checkpoint(directory)
    assert not (tmp_path / "pwned").exists()
    torch.save({"x": torch.ones(1)}, second)
    with pytest.raises(HerdError, match=r"tok_embeddings.weight is not in every consolidated"):
        open_checkpoint(directory)
    wider = torch.load(directory / "consolidated.00.pth", weights_only=True)
    torch.save(wider | {"norm.weight": torch.ones(9)}, second)
    with pytest.raises(HerdError, match=r"norm.weight has the shapes \[\[64\], \[9\]\] in its consolidated"):
        open_checkpoint(directory)
    torch.save([1], second)
    with pytest.raises(HerdError, match="holds a list, tensors by name are needed"):
        open_checkpoint(directory)
    second.rename(directory / "consolidated.02.pth")
    with pytest.raises(HerdError, match=r"has no consolidated.\*.pth of rank 1, its last rank is 2"):
        open_checkpoint(directory)
    (directory / "consolidated.02.pth").unlink()
    with pytest.raises(HerdError, match=r"has shape \[256, 64\], its config gives \[512, 64\]"):
        open_checkpoint(directory)
    (directory / "int4_scales_0.pt").write_bytes(b"")
    with pytest.raises(HerdError, match="int4_mixed"):
        open_checkpoint(directory)
    (directory / "consolidated.00.pth").unlink()
    with pytest.raises(HerdError, match=r"no consolidated.\*.pth"):
        open_checkpoint(directory)


def test_unknown_and_missing_tensors(tmp_path: Path) -> None:
    _, weights = canonical()
    write_meta(tmp_path, weights)
    path = tmp_path / "consolidated.00.pth"
    stored = torch.load(path, weights_only=True)
    torch.save(stored | {"layers.0.adapter": torch.ones(1)}, path)
    with pytest.raises(HerdError, match=r"has a tensor layers.0.adapter that its params.json does not explain"):
        open_checkpoint(tmp_path)
    del stored["layers.2.attention.wo.weight"]
    torch.save(stored, path)
    with pytest.raises(HerdError, match=r"has no tensor layers.2.attention.wo.weight"):
        open_checkpoint(tmp_path)
