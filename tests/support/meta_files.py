"""Checkpoints in Meta's layout, written from known weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from herdgraph.model.config import from_meta
from support import herds

# Widths follow llama-models' rule: dense ceil8(int(2/3 · 4 · 64)) = 176, expert ceil8(int(int(2/3 · 256) / 2)) = 88.
PARAMS = {
    "dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 8, "ffn_exp": 4.0,
    "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
    "use_qk_norm": True, "nope_layer_interval": 4, "attention_chunk_size": 16,
    "attn_temperature_tuning": True, "floor_scale": 8.0,
    "moe_args": {"num_experts": 4, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1,
                 "interleave_moe_layer_step": 2},
    "vision_args": {"image_size": {"height": 28, "width": 28}, "patch_size": {"height": 7, "width": 7}, "dim": 32,
                    "n_layers": 2, "n_heads": 2, "mlp_ratio": 4.0, "output_dim": 48, "pixel_shuffle_ratio": 0.5},
}
Tensors = dict[str, torch.Tensor]


def canonical() -> tuple[torch.nn.Module, Tensors]:
    """transformers' model of ``PARAMS`` and its weights by canonical name."""
    config = from_meta(PARAMS)
    # Meta's special tokens lie outside of this tiny vocabulary; transformers insists on the padding one.
    model = herds.reference(replace(config, text=replace(config.text, pad_token_id=0)))
    prefixes = ("language_model.model.", "language_model.")
    tensors = {}
    for name, value in model.state_dict().items():
        tensors[name.removeprefix(next((p for p in prefixes if name.startswith(p)), ""))] = value
    return model, tensors


def rank_weights(weights: Tensors, rank: int, ranks: int, *, fused: bool) -> Tensors:
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
    return {name: value.clone() for name, value in (out | _vision_weights(weights, rows, columns)).items()}


def _vision_weights(weights: Tensors, rows: object, columns: object) -> Tensors:
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


def write_meta(directory: Path, weights: Tensors, ranks: int = 1, *, fused: bool = True) -> None:
    """Write ``params.json`` and a ``consolidated.*.pth`` per rank."""
    directory.mkdir(exist_ok=True)
    (directory / "params.json").write_text(json.dumps(PARAMS))
    for rank in range(ranks):
        torch.save(rank_weights(weights, rank, ranks, fused=fused), directory / f"consolidated.{rank:02}.pth")
