"""Meta's layout, written here from known weights: one and two ranks, fused and plain names, FP8, damage."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import herds
import numpy as np
import pytest
import torch
from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.checkpoint.meta import resampled_positions
from herdgraph.model.config import HerdConfig
from herdgraph.model.herd import Llama4
from herdgraph.runtimes import Engine

# Widths follow llama-models' rule: dense ceil8(int(2/3 · 4 · 64)) = 176, expert ceil8(int(int(2/3 · 256) / 2)) = 88.
PARAMS = {
    "dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 8, "ffn_exp": 4.0,
    "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True, "use_qk_norm": True, "nope_layer_interval": 4,
    "attention_chunk_size": 16, "attn_temperature_tuning": True, "floor_scale": 8.0,
    "moe_args": {"num_experts": 4, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1,
                 "interleave_moe_layer_step": 2},
    "vision_args": {"image_size": {"height": 28, "width": 28}, "patch_size": {"height": 7, "width": 7}, "dim": 32,
                    "n_layers": 2, "n_heads": 2, "mlp_ratio": 4.0, "output_dim": 48, "pixel_shuffle_ratio": 0.5},
}
Tensors = dict[str, torch.Tensor]


def _canonical() -> tuple[torch.nn.Module, Tensors]:
    config = HerdConfig.from_meta(PARAMS)
    # Meta's special tokens lie outside of this tiny vocabulary; transformers insists on the padding one.
    model = herds.reference(replace(config, text=replace(config.text, pad_token_id=0)))
    prefixes = ("language_model.model.", "language_model.")
    tensors = {}
    for name, value in model.state_dict().items():
        tensors[name.removeprefix(next((p for p in prefixes if name.startswith(p)), ""))] = value
    return model, tensors


def _rank(weights: Tensors, rank: int, ranks: int, *, fused: bool) -> Tensors:
    """One tensor-parallel rank in Meta's names: rows of column-parallel, columns of row-parallel weights."""

    def rows(name: str) -> torch.Tensor:
        return weights[name].chunk(ranks, 0)[rank]

    def columns(name: str) -> torch.Tensor:
        return weights[name].chunk(ranks, 1)[rank]

    out = {"tok_embeddings.weight": rows("embed_tokens.weight"), "output.weight": rows("lm_head.weight"),
           "norm.weight": weights["norm.weight"], "rope.freqs": torch.ones(4)}
    for layer in range(4):
        ours, at, ffn = f"layers.{layer}", f"layers.{layer}.attention", f"layers.{layer}.feed_forward"
        norm = weights[f"{ours}.input_layernorm.weight"]
        qkv = [rows(f"{ours}.self_attn.{x}_proj.weight") for x in "qkv"]
        out[f"{at}.wo.weight"] = columns(f"{ours}.self_attn.o_proj.weight")
        if fused:
            out |= {f"{at}.wqkv.weight": torch.cat(qkv), f"{at}.wqkv.layer_norm_weight": norm}
        else:
            out |= {f"{at}.w{x}.weight": value for x, value in zip("qkv", qkv, strict=True)}
            out[f"layers.{layer}.attention_norm.weight"] = norm
        post = weights[f"{ours}.post_attention_layernorm.weight"]
        if layer % 2 == 0:
            gate, up = (rows(f"{ours}.feed_forward.{name}_proj.weight") for name in ("gate", "up"))
            down = columns(f"{ours}.feed_forward.down_proj.weight")
            if fused:
                out |= {f"{ffn}.mlp.fc1_weight": torch.cat((gate, up)), f"{ffn}.mlp.fc2_weight": down,
                        f"{ffn}.mlp.layer_norm_weight": post, f"{ffn}.mlp._extra_state": torch.ones(1)}
            else:
                out |= {f"{ffn}.w1.weight": gate, f"{ffn}.w3.weight": up, f"{ffn}.w2.weight": down,
                        f"layers.{layer}.ffn_norm.weight": post}
            continue
        out[f"{ffn}.norm.weight"] = post
        out[f"{ffn}.router_DE"] = weights[f"{ours}.feed_forward.router.weight"].T.contiguous()
        gate, up = weights[f"{ours}.feed_forward.experts.gate_up_proj"].chunk(2, -1)
        for name, value, axis in (("moe_w_in_eD_F", gate, 2), ("moe_w_swiglu_eD_F", up, 2),
                                  ("moe_w_out_eF_D", weights[f"{ours}.feed_forward.experts.down_proj"], 1)):
            out[f"{ffn}.experts.{name}"] = value.chunk(ranks, axis)[rank].flatten(0, 1).contiguous()
        shared = f"{ours}.feed_forward.shared_expert"
        out |= {f"{ffn}.w_in_shared_FD.weight": rows(f"{shared}.gate_proj.weight"),
                f"{ffn}.w_swiglu_FD.weight": rows(f"{shared}.up_proj.weight"),
                f"{ffn}.w_out_shared_DF.weight": columns(f"{shared}.down_proj.weight")}
    return {name: value.clone() for name, value in (out | _vision_rank(weights, rows, columns)).items()}


def _vision_rank(weights: Tensors, rows: object, columns: object) -> Tensors:
    at, adapter = "vision_embeddings.vision_encoder", "vision_embeddings.vision_adapter.mlp"
    ours = "vision_model"
    out = {
        f"{at}.class_embedding": weights[f"{ours}.class_embedding"],
        f"{at}.positional_embedding_vlm": weights[f"{ours}.positional_embedding_vlm"],
        f"{at}.conv1._linear.weight": rows(f"{ours}.patch_embedding.linear.weight"),
        f"{adapter}.c_fc.weight": rows(f"{ours}.vision_adapter.mlp.fc1.weight"),
        f"{adapter}.c_proj.weight": columns(f"{ours}.vision_adapter.mlp.fc2.weight"),
        "vision_projection.weight": rows("multi_modal_projector.linear_1.weight"),
    }
    norms = {"layernorm_pre": "ln_pre", "layernorm_post": "ln_post"}
    for layer in range(2):
        block, theirs = f"model.layers.{layer}", f"transformer.resblocks.{layer}"
        norms |= {f"{block}.input_layernorm": f"{theirs}.ln_1", f"{block}.post_attention_layernorm": f"{theirs}.ln_2"}
        for name, stored in (("self_attn.q_proj", "attn.wq"), ("self_attn.k_proj", "attn.wk"),
                             ("self_attn.v_proj", "attn.wv"), ("mlp.fc1", "mlp.c_fc")):
            for kind in ("weight", "bias"):
                out[f"{at}.{theirs}.{stored}.{kind}"] = rows(f"{ours}.{block}.{name}.{kind}")
        for name, stored in (("self_attn.o_proj", "attn.wo"), ("mlp.fc2", "mlp.c_proj")):
            out[f"{at}.{theirs}.{stored}.weight"] = columns(f"{ours}.{block}.{name}.weight")
            out[f"{at}.{theirs}.{stored}.bias"] = weights[f"{ours}.{block}.{name}.bias"]
    for name, stored in norms.items():
        for kind in ("weight", "bias"):
            out[f"{at}.{stored}.{kind}"] = weights[f"{ours}.{name}.{kind}"]
    return out


def _write(directory: Path, weights: Tensors, ranks: int = 1, *, fused: bool = True) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "params.json").write_text(json.dumps(PARAMS))
    for rank in range(ranks):
        torch.save(_rank(weights, rank, ranks, fused=fused), directory / f"consolidated.{rank:02}.pth")


@pytest.mark.parametrize(("ranks", "fused"), [(1, True), (1, False), (2, True), (2, False)])
def test_every_tensor(ranks: int, fused: bool, tmp_path: Path) -> None:
    _, weights = _canonical()
    _write(tmp_path, weights, ranks, fused=fused)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(weights)
        for name, expected in weights.items():
            assert torch.equal(checkpoint.read(name), expected), name
            middle = slice(1, max(2, len(expected) - 1))
            assert torch.equal(checkpoint.read(name, middle), expected[middle]), name
            assert torch.equal(checkpoint.read(name, 0), expected[0]), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_same_logits_through_torch_and_bundle(ranks: int, tmp_path: Path) -> None:
    model, weights = _canonical()
    _write(tmp_path / "meta", weights, ranks)
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
    _, weights = _canonical()
    _write(tmp_path, weights)
    stored = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    raw = torch.randn(17, 32)
    stored["vision_embeddings.vision_encoder.positional_embedding"] = raw
    torch.save(stored, tmp_path / "consolidated.00.pth")
    with open_checkpoint(tmp_path) as checkpoint:
        found = checkpoint.read("vision_model.positional_embedding_vlm")
    torch.testing.assert_close(found, _hook_by_hand(raw, 4), atol=1e-6, rtol=0)
    assert torch.equal(found, resampled_positions(raw, 4))


@pytest.mark.parametrize("ranks", [1, 2])
def test_fp8_mixed(ranks: int, tmp_path: Path) -> None:
    """Routed experts per output row in FP8, scales by mapped name and in [E, out] orientation."""
    _, weights = _canonical()
    _write(tmp_path, weights, ranks)
    for rank in range(ranks):
        path = tmp_path / f"consolidated.{rank:02}.pth"
        stored, scales = torch.load(path, weights_only=True), {}
        for key, name in (("w1", "moe_w_in_eD_F"), ("w3", "moe_w_swiglu_eD_F"), ("w2", "moe_w_out_eF_D")):
            full = f"layers.1.feed_forward.experts.{name}"
            value = stored[full].unflatten(0, (4, -1))
            scale = value.abs().amax(1) / 448
            scales[f"layers.1.feed_forward.experts.{key}"] = scale
            stored[full] = (value / scale[:, None]).to(torch.float8_e4m3fn).flatten(0, 1)
        torch.save(stored, path)
        torch.save(scales, tmp_path / f"fp8_scales_{rank}.pt")
    with open_checkpoint(tmp_path) as checkpoint:
        for name in ("gate_up_proj", "down_proj"):
            full = f"layers.1.feed_forward.experts.{name}"
            torch.testing.assert_close(checkpoint.read(full), weights[full], atol=0.01, rtol=0.07)
            assert torch.equal(checkpoint.read(full, 3), checkpoint.read(full)[3])
    (tmp_path / "fp8_scales_0.pt").unlink()
    with pytest.raises(HerdError, match="fp8_scales"):
        open_checkpoint(tmp_path)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "meta"
    _, weights = _canonical()
    _write(directory, weights, 2)
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
    second.unlink()
    with pytest.raises(HerdError, match="has shape"):
        open_checkpoint(directory)
    (directory / "int4_scales_0.pt").write_bytes(b"")
    with pytest.raises(HerdError, match="int4_mixed"):
        open_checkpoint(directory)
    (directory / "consolidated.00.pth").unlink()
    with pytest.raises(HerdError, match=r"no consolidated.\*.pth"):
        open_checkpoint(directory)


def test_unknown_and_missing_tensors(tmp_path: Path) -> None:
    _, weights = _canonical()
    _write(tmp_path, weights)
    path = tmp_path / "consolidated.00.pth"
    stored = torch.load(path, weights_only=True)
    torch.save(stored | {"layers.0.adapter": torch.ones(1)}, path)
    with pytest.raises(HerdError, match=r"has a tensor layers.0.adapter that its params.json does not explain"):
        open_checkpoint(tmp_path)
    del stored["layers.2.attention.wo.weight"]
    torch.save(stored, path)
    with pytest.raises(HerdError, match=r"has no tensor layers.2.attention.wo.weight"):
        open_checkpoint(tmp_path)
