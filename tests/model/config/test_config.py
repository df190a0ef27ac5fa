"""Configurations: published traps, Meta's file, round trips."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.llama4.args import ModelArgs
from transformers import Llama4Config

from herdgraph.errors import HerdError
from herdgraph.model.config import HerdConfig, from_hf, from_meta, read_config, to_hf
from herdgraph.model.config.parameter_counts import model_size
from herdgraph.model.config.presets import MAVERICK, PRESETS, SCOUT, TINY, preset

# As in published files: interval-derived layers, an integer flag, RoPE scaling in its old place.
PUBLISHED = {
    "model_type": "llama4",
    "boi_token_index": 200080, "eoi_token_index": 200081, "image_token_index": 200092,
    "text_config": {
        "model_type": "llama4_text", "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192,
        "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "head_dim": 128, "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
        "no_rope_layers": [], "attention_chunk_size": 8192, "attn_temperature_tuning": 4, "floor_scale": 8192,
        "attn_scale": 0.1, "use_qk_norm": True, "rope_theta": 500000.0, "max_position_embeddings": 10485760,
        "rope_scaling": {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192},
        "bos_token_id": 200000, "eos_token_id": [200001, 200007, 200008], "pad_token_id": 200018,
        "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
    },
    "vision_config": {
        "hidden_size": 1408, "num_hidden_layers": 34, "num_attention_heads": 16, "intermediate_size": 5632,
        "image_size": 336, "patch_size": 14, "projector_input_dim": 4096, "projector_output_dim": 4096,
        "vision_output_dim": 4096, "pixel_shuffle_ratio": 0.5, "rope_theta": 10000,
    },
}

# Scout's params.json, as llama-models' ModelArgs reads it.
META = {
    "dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "vocab_size": 202048, "multiple_of": 2048,
    "ffn_dim_multiplier": 1.2, "ffn_exp": 4.0, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
    "use_qk_norm": True, "nope_layer_interval": 4, "attention_chunk_size": 8192, "attn_temperature_tuning": True,
    "moe_args": {"num_experts": 16, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1,
                 "interleave_moe_layer_step": 1},
    "vision_args": {"image_size": {"height": 336, "width": 336}, "patch_size": {"height": 14, "width": 14},
                    "dim": 1408, "n_layers": 34, "n_heads": 16, "mlp_ratio": 4.0, "output_dim": 4096,
                    "pixel_shuffle_ratio": 0.5},
}


def _changed(**text: object) -> dict[str, object]:
    return {**PUBLISHED, "text_config": {**PUBLISHED["text_config"], **text}}


def _vision(**vision: object) -> dict[str, object]:
    return {**PUBLISHED, "vision_config": {**PUBLISHED["vision_config"], **vision}}


def test_from_hf_published_scout() -> None:
    assert from_hf(PUBLISHED) == SCOUT


def test_from_hf_published_maverick() -> None:
    raw = _changed(num_local_experts=128, interleave_moe_layer_step=2, use_qk_norm=False, rope_scaling=None,
                   max_position_embeddings=1048576)
    assert from_hf(raw) == MAVERICK
    assert MAVERICK.text.moe_layers == tuple(range(1, 48, 2))


def test_from_meta_scout() -> None:
    """Meta's and Hugging Face's files describe the same model."""
    text, expected = from_meta(META).text, SCOUT.text
    assert ModelArgs(**META).rope_scaling_factor == text.rope_scaling.factor == 16
    for name in ("hidden_size", "dense_size", "expert_size", "moe_layers", "rope_layers", "chunked_layers",
                 "rope_scaling", "use_qk_norm", "num_experts", "attn_temperature_tuning", "floor_scale"):
        assert getattr(text, name) == getattr(expected, name), name
    assert from_meta(META).vision == SCOUT.vision


def test_from_hf_null_chunk() -> None:
    """No chunk means global attention everywhere; RoPE layers stay."""
    text = from_hf(_changed(attention_chunk_size=None)).text
    assert not any(text.chunked_layers)
    assert not any(text.rope_layers[3::4])


def test_from_hf_without_vision() -> None:
    assert from_hf(PUBLISHED["text_config"]).vision is None
    assert from_hf({**PUBLISHED, "vision_config": None}).vision is None


@pytest.mark.parametrize("name", PRESETS)
def test_preset_round_trips(name: str) -> None:
    config = preset(name)
    assert from_hf(to_hf(config)) == config
    assert HerdConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_to_hf_read_by_transformers() -> None:
    theirs = Llama4Config(**{k: v for k, v in to_hf(SCOUT).items() if k != "architectures"}).text_config
    assert theirs.no_rope_layers == [int(flag) for flag in SCOUT.text.rope_layers]
    assert theirs.layer_types.count("full_attention") == 12


@pytest.mark.parametrize(("config", "total", "active"), [
    # llama4.md section 1: counted on the meta device from transformers' model; active derived by hand there.
    (SCOUT, 108_641_793_536, 17.17e9), (MAVERICK, 401_583_781_376, 17.18e9),
], ids=["scout", "maverick"])
def test_parameter_counts(config: HerdConfig, total: int, active: float) -> None:
    facts = model_size(config)
    assert facts.total == total
    assert facts.active == pytest.approx(active, rel=1e-3)
    assert facts.kv_global_bytes == 48 * 1024
    assert facts.kv_local_cap_bytes == 1.125 * 2**30


@pytest.mark.parametrize(("raw", "message"), [
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"model_type": "llama4", "text_config": {}}, "no value for 'num_hidden_layers'"),
    (_changed(num_key_value_heads=7), "40 attention heads cannot share 7"),
    (_changed(num_experts_per_tok=17), "num_experts_per_tok 17"),
    (_changed(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_type is 'yarn'"),
    (_changed(hidden_size="wide"), "text_config.hidden_size is 'wide', a whole number is needed"),
    (_changed(attention_chunk_size=-5), "attention_chunk_size is -5, it must be at least 1"),
    (_changed(max_position_embeddings=0), "max_position_embeddings is 0, it must be above 0"),
    (_changed(rms_norm_eps=float("nan")), "rms_norm_eps is nan, a finite number is needed"),
    (_changed(vocab_size=1 << 41), "vocab_size is 2199023255552, at most 1099511627776 is possible"),
    (_changed(vocab_size=8.5), "vocab_size is 8.5, a whole number is needed"),
    (_changed(hidden_size=None), "there is no value for 'hidden_size' in text_config"),
    (_changed(layer_types=[1]), r"layer_types is \[1\], a list of texts is needed"),
    (_changed(num_hidden_layers=0), "num_hidden_layers is 0"),
    (_changed(num_hidden_layers=10**12), "num_hidden_layers is 1000000000000, it must be within 1 and 10000"),
    (_changed(num_attention_heads=0), "num_attention_heads is 0"),
    (_changed(num_key_value_heads=0), "num_kv_heads is 0"),
    (_changed(vocab_size=True), "vocab_size is True, a whole number is needed"),
    (_changed(eos_token_id=["a"]), r"eos_token_id is \['a'\], a whole number or a list of whole numbers is needed"),
    (_changed(moe_layers=3), "moe_layers is 3, a list of whole numbers or null is needed"),
    (_changed(rope_scaling=[1]), r"rope_scaling is \[1\], a JSON object is needed"),
    (_vision(patch_size=0), "patch_size is 0, it must be above 0"),
    (_vision(num_attention_heads=0), "num_heads is 0, it must be above 0"),
    (_vision(pixel_shuffle_ratio=0), "pixel_shuffle_ratio is 0.0, it must be above 0"),
    (_vision(image_size=[336, 14]), r"image_size is \[336, 14\], a square is needed"),
    ({**PUBLISHED, "vision_config": [1]}, r"vision_config is \[1\], a JSON object is needed"),
    ({**PUBLISHED, "image_token_index": "x"}, "image_token_index is 'x', a whole number or null is needed"),
])
def test_from_hf_refusals(raw: dict[str, object], message: str) -> None:
    with pytest.raises(HerdError, match=message):
        from_hf(raw)


@pytest.mark.parametrize(("change", "message"), [
    ({"n_layers": 0}, "n_layers is 0, it must be within 1 and 10000"),
    ({"n_heads": 0}, "n_heads is 0, it must be within"),
    ({"multiple_of": 0}, "multiple_of is 0, it must be within"),
    ({"moe_args": {"num_experts": 16, "capacity_factor": -1}}, "moe_args.capacity_factor is -1.*, it must be at least"),
    ({"moe_args": [1]}, r"moe_args is \[1\], a JSON object is needed"),
    ({"moe_args": {"num_experts": 16, "interleave_moe_layer_step": 0}}, "moe_args.interleave_moe_layer_step is 0"),
    ({"norm_eps": float("inf")}, "norm_eps is inf, a finite number is needed"),
    ({"vision_args": 5}, "vision_args is 5, a JSON object is needed"),
    ({"attention_chunk_size": -1}, "attention_chunk_size is -1, it must be at least 1"),
    ({"dim": "wide"}, "dim is 'wide', a whole number is needed"),
], ids=str)
def test_from_meta_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises(HerdError, match=message):
        from_meta({**META, **change})


@pytest.mark.parametrize(("change", "message"), [
    ({"vision": 5}, "VisionConfig is 5, a JSON object is needed"),
    ({"colour": "red"}, "HerdConfig has an unknown field 'colour'"),
    ({"text": {**TINY.to_json()["text"], "top_k": "1"}}, "top_k is '1', a whole number is needed"),
    ({"text": {name: value for name, value in TINY.to_json()["text"].items() if name != "top_k"}},
     "TextConfig has no field 'top_k'"),
    ({"text": {**TINY.to_json()["text"], "moe_layers": [1, "x"]}}, "moe_layers is .*, a list of whole numbers"),
], ids=["vision", "unknown", "type", "missing", "item"])
def test_from_json_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises(HerdError, match=message):
        HerdConfig.from_json({**TINY.to_json(), **change})


def _places(raw: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every value in nested objects."""
    return [place for name, value in raw.items()
            for place in ((*path, name), *(_places(value, (*path, name)) if isinstance(value, dict) else ()))]


JUNK = st.sampled_from([None, True, -1, 0, 1, 3, 2.5, 1e300, float("nan"), float("inf"), 1 << 70, "", "x", [], [None],
                        ["x"], [True, 1.0], {}, {"a": None}, {"height": 1, "width": "x"}])


@pytest.mark.parametrize(("raw", "parse"), [
    (PUBLISHED, from_hf), (META, from_meta), (TINY.to_json(), HerdConfig.from_json),
], ids=["huggingface", "meta", "stored"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_junk_is_read_or_refused(
    raw: dict[str, Any], parse: Callable[[dict[str, Any]], HerdConfig], data: st.DataObject
) -> None:
    """Whatever stands in a file, the outcome is a configuration or one line for people."""
    changed = copy.deepcopy(raw)
    for *path, name in data.draw(st.lists(st.sampled_from(_places(raw)), min_size=1, max_size=2)):
        section = changed
        for step in path:
            section = section.get(step) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[name] = data.draw(JUNK)
    with contextlib.suppress(HerdError):
        assert isinstance(parse(changed), HerdConfig)


def test_from_hf_integral_floats() -> None:
    """JSON has one type of number, and some tools write 8192.0."""
    assert from_hf(_changed(num_hidden_layers=48.0, eos_token_id=[200001.0, 200007, 200008])) == SCOUT


def test_from_hf_null_fields() -> None:
    """Null stands for the default, and for off where a field can be off."""
    text = from_hf(_changed(num_local_experts=None, use_qk_norm=None)).text
    assert text.num_experts == 16
    assert not text.use_qk_norm


def test_read_config_refusals(tmp_path: Path) -> None:
    with pytest.raises(HerdError, match="nothing does not exist: give a checkpoint directory"):
        read_config(tmp_path / "nothing")
    with pytest.raises(HerdError, match=r"neither config\.json nor params\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(HerdError, match="cannot be read as JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(HerdError, match="cannot be read as JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama4"}')
    with pytest.raises(HerdError, match=r"config\.json: there is no value for 'num_hidden_layers'"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "params.json").write_text('{"dim": 4096}')
    with pytest.raises(HerdError, match="no moe_args"):
        read_config(tmp_path)


def test_preset_unknown_name() -> None:
    with pytest.raises(HerdError, match="no preset is called 'leviathan'"):
        preset("leviathan")
