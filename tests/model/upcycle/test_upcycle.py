"""Upcycled checkpoints against the dense models they came from, both computed by transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, Llama4ForCausalLM, LlamaConfig, LlamaForCausalLM

from herdgraph.errors import HerdError
from herdgraph.model.config import RopeScaling, read_config
from herdgraph.model.upcycle import open_dense, upcycle
from herdgraph.model.upcycle.experts import SHARPNESS, DenseFeedForward, mixture_tensors

LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, FFN = 3, 4, 2, 16, 64, 96
TEXT = "In 1987 she'd paid 3150 dollars  for the lighthouse; naïve café owners\n\n laughed.\tDON'T  they say?  \n"
LLAMA31 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def dense_llama(*, tied: bool = False, vocab: int = 300, **changes: Any) -> LlamaForCausalLM:
    """A random dense Llama whose logits spread over several units, so that mistakes show."""
    config = LlamaConfig(**{
        "vocab_size": vocab, "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "initializer_range": 0.15, "bos_token_id": 1,
        "eos_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **changes,
    })
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def logits_of(model: torch.nn.Module, tokens: int = 40) -> Tensor:
    ids = torch.randint(0, 300, (2, tokens), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(ids).logits.float()


def upcycled(source: Path, output: Path, **options: Any) -> Llama4ForCausalLM:
    upcycle(source, output, **{"dtype": "float32", **options})
    return Llama4ForCausalLM.from_pretrained(output, dtype=torch.float32).eval()


def kl_per_token(dense: Tensor, other: Tensor) -> float:
    p, q = dense.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's ``permute``."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def half_split(rows: Tensor, heads: int) -> Tensor:
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    if name in names:
        return names[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def trained_bpe(pre: str) -> Tokenizer:
    """A small byte-level BPE whose pre-tokenizer is written down here again, from the models' own files."""
    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre != "llama-bpe")
    first = {"gpt2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)],
             "llama-bpe": [pre_tokenizers.Split(Regex(llama3), behavior="isolated")]}[pre]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False, special_tokens=["<|pad|>", "<|bos|>", "<|end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT] * 8, trainer)
    return tokenizer


def write_gguf(path: Path, model: LlamaForCausalLM, *, pre: str = "gpt2", architecture: str = "llama",
               quantised: tuple[str, ...] = (), extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None) -> Path:
    """The model and a tokenizer as llama.cpp's converter writes them."""
    writer, config = gguf.GGUFWriter(path, architecture), model.config
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    bpe = json.loads(trained_bpe(pre).to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    extra(writer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleaved(tensor, HEADS if "q_proj" in name else KV_HEADS)  # noqa: PLW2901
        kind = gguf.GGMLQuantizationType.Q8_0 if name.endswith(quantised) and quantised else None
        values = np.ascontiguousarray(tensor.numpy())
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind) if kind else values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"tied": True}, {"experts": 3}),
        ({"tied": False}, {"experts": 1}),
        ({"rope_parameters": LLAMA31}, {"moe_every": 2}),
        ({"head_dim": 32}, {"experts": 2, "moe_every": 3}),
    ],
    ids=["tied", "untied", "llama3-scaling-and-dense-layers", "wide-heads"],
)
def test_shared_mode_keeps_the_function(tmp_path: Path, changes: dict[str, Any], options: dict[str, Any]) -> None:
    dense = dense_llama(**changes)
    dense.save_pretrained(tmp_path / "dense")
    model = upcycled(tmp_path / "dense", tmp_path / "out", **options)
    assert torch.allclose(logits_of(model), logits_of(dense), atol=1e-4)


def test_upcycled_config_has_plain_attention(tmp_path: Path) -> None:
    dense_llama(tied=True).save_pretrained(tmp_path / "dense")
    report = upcycle(tmp_path / "dense", tmp_path / "out", experts=4, mode="split", moe_every=2)
    config = read_config(tmp_path / "out")
    assert config == report.config
    text = config.text
    assert (text.moe_layers, text.num_experts, text.top_k) == ((1,), 4, 1)
    assert (text.expert_size, text.dense_size) == (FFN // 2, FFN)
    assert text.rope_layers == (True,) * LAYERS
    assert not any(text.chunk_of(layer) for layer in range(LAYERS))
    assert text.tie_word_embeddings
    assert not text.use_qk_norm
    assert not text.attn_temperature_tuning
    assert text.eos_token_ids == (2,)
    dense_layers = 2 * 3 * WIDTH * FFN
    mixture = 4 * WIDTH + (1 + 4) * 3 * WIDTH * FFN // 2
    attention = LAYERS * (2 * WIDTH * HEADS * HEAD_DIM + 2 * WIDTH * KV_HEADS * HEAD_DIM)
    assert report.total == 300 * WIDTH + (2 * LAYERS + 1) * WIDTH + attention + dense_layers + mixture
    assert report.active == report.total - 3 * 3 * WIDTH * FFN // 2
    assert json.loads(json.dumps(report.to_json()))["mode"] == "split"


def test_split_mode_keeps_the_function_nearly(tmp_path: Path) -> None:
    dense = dense_llama()
    dense.save_pretrained(tmp_path / "dense")
    model = upcycled(tmp_path / "dense", tmp_path / "out", mode="split", experts=8)
    # Measured: 0 up to rounding, as none of these few tokens is near a tie of the router.
    assert kl_per_token(logits_of(dense), logits_of(model)) < 1e-4
    silenced = {name: value for name, value in model.named_parameters() if name.endswith("experts.down_proj")}
    for value in silenced.values():
        torch.nn.init.zeros_(value)
    assert kl_per_token(logits_of(dense), logits_of(model)) > 0.1, "the routed experts carried nothing"


def test_dropped_neurons_are_others_in_each_expert_and_the_rest_stays() -> None:
    ffn = DenseFeedForward(torch.randn(FFN, WIDTH), torch.randn(FFN, WIDTH), torch.randn(WIDTH, FFN), torch.ones(WIDTH))
    found = [dict(mixture_tensors(ffn, mode="split", experts=4, dtype=torch.float32, drop=drop,
                                  generator=torch.Generator().manual_seed(0)))["experts.down_proj"]
             for drop in (0.0, 0.25)]
    changed_EF = (found[0] != found[1]).any(-1)
    assert changed_EF.sum(1).tolist() == [round(0.25 * (FFN // 2))] * 4
    assert len(changed_EF.unique(dim=0)) > 1
    assert float(found[1][changed_EF].std()) == pytest.approx(float(ffn.down.std()), rel=0.2)


def test_split_mode_is_exact_where_the_router_is_decided() -> None:
    ffn = DenseFeedForward(torch.randn(FFN, WIDTH), torch.randn(FFN, WIDTH), torch.randn(WIDTH, FFN),
                           torch.rand(WIDTH) + 0.5)
    parts = dict(mixture_tensors(ffn, mode="split", experts=6, dtype=torch.float32,
                                 generator=torch.Generator().manual_seed(3)))
    router = parts["router.weight"]
    assert torch.equal(router[0::2], -router[1::2])
    rms = ffn.norm.square().mean().sqrt()
    assert torch.allclose(router.norm(dim=1) * rms, torch.tensor(SHARPNESS))
    x = torch.randn(5, WIDTH) * 0.1
    expected = (functional.silu(x @ ffn.gate.T) * (x @ ffn.up.T)) @ ffn.down.T
    gate, up, down = (parts[f"shared_expert.{name}_proj.weight"].T for name in ("gate", "up", "down"))
    shared = (functional.silu(x @ gate) * (x @ up)) @ down
    for expert in range(6):
        gates, ups = (x @ parts["experts.gate_up_proj"][expert]).chunk(2, dim=-1)
        routed = (functional.silu(gates) * ups) @ parts["experts.down_proj"][expert]
        assert torch.allclose(shared + routed, expected, atol=1e-4)


def test_the_seed_decides_the_random_weights(tmp_path: Path) -> None:
    dense_llama().save_pretrained(tmp_path / "dense")
    routers = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        model = upcycled(tmp_path / "dense", tmp_path / name, seed=seed)
        routers.append(model.model.layers[2].feed_forward.router.weight)
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])


def test_shards_bfloat16_and_tokenizer_files(tmp_path: Path) -> None:
    dense_llama().to(torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    assert len(list((tmp_path / "dense").glob("model-*.safetensors"))) > 2
    (tmp_path / "dense" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "dense" / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    model = upcycled(tmp_path / "dense", tmp_path / "out", dtype="bfloat16")
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    assert torch.allclose(logits_of(model), logits_of(dense), atol=1e-4)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert read_config(tmp_path / "out").text.eos_token_ids == (2, 5)


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_keeps_the_function(tmp_path: Path, tied: bool) -> None:
    dense = dense_llama(tied=tied, vocab=330)
    path = write_gguf(tmp_path / "dense.gguf", dense)
    assert torch.allclose(logits_of(upcycled(path, tmp_path / "out")), logits_of(dense), atol=1e-4)


def test_gguf_quantised_with_llama_31_scaling(tmp_path: Path) -> None:
    # Long wavelengths need a wide head: with 16 elements nothing would fall between the two limits.
    dense = dense_llama(vocab=330, head_dim=64, rope_parameters=LLAMA31)
    scaled = dense.model.rotary_emb.inv_freq
    factors = 1 / (500000.0 ** (torch.arange(0, 64, 2) / 64)) / scaled
    assert len(factors.unique()) > 3

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(64)
        writer.add_tensor("rope_freqs.weight", factors.numpy().astype(np.float32))

    path = write_gguf(tmp_path / "dense.gguf", dense, quantised=("down_proj.weight", "q_proj.weight"), extra=extra)
    for layer in dense.model.layers:
        for linear in (layer.mlp.down_proj, layer.self_attn.q_proj):
            rounded = gguf.quants.quantize(linear.weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
            values = gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType.Q8_0)
            linear.weight.data = torch.from_numpy(values.copy())
    assert torch.allclose(logits_of(upcycled(path, tmp_path / "out")), logits_of(dense), atol=1e-4)
    assert read_config(tmp_path / "out").text.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


@pytest.mark.parametrize("pre", ["gpt2", "smollm", "llama-bpe"])
def test_gguf_tokenizer_is_the_one_it_was_written_from(tmp_path: Path, pre: str) -> None:
    path = write_gguf(tmp_path / "dense.gguf", dense_llama(vocab=330), pre=pre)
    upcycle(path, tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    original = trained_bpe(pre)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert ids == original.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT
    assert tokenizer.encode("<|end|>", add_special_tokens=False).ids == [2]
    assert tokenizer.encode("a").ids[:-1] == ([1] if pre == "llama-bpe" else [])
    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert auto(TEXT).input_ids == ([1] if pre == "llama-bpe" else []) + ids
    assert (auto.eos_token_id, auto.bos_token_id, auto.pad_token_id) == (2, 1, 0)
    assert auto.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2]


def test_gguf_end_of_turn_joins_the_stops(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "dense.gguf", dense_llama(vocab=330), extra=lambda writer: writer.add_eot_token_id(0))
    assert open_dense(path).eos_token_ids == (2, 0)


@pytest.fixture
def dense_directory(tmp_path: Path) -> Path:
    dense_llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "split", "experts": 3}, "3 experts were asked for, split mode pairs them"),
        ({"experts": 0}, "0 experts were asked for, at least 1"),
        ({"mode": "half"}, "mode is 'half', choose one of shared, split"),
        ({"dtype": "float16"}, "dtype is 'float16', choose one of bfloat16, float32"),
        ({"moe_every": 4}, "moe_every is 4, the model has 3 layers"),
        ({"seed": -1}, "seed is -1, it must be within 0 and"),
        ({"seed": 10**30}, "seed is 10+, it must be within 0 and"),
        ({"experts": 10**12}, r"the checkpoint needs .* TB, .* free: choose another output or make room"),
    ],
)
def test_impossible_options(dense_directory: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HerdError, match=message):
        upcycle(dense_directory, dense_directory.parent / "out", **options)
    assert not (dense_directory.parent / "out").exists()


def test_overwriting_the_dense_model_is_refused(dense_directory: Path) -> None:
    with pytest.raises(HerdError, match="overlaps the input"):
        upcycle(dense_directory, dense_directory, overwrite=True)
    (dense_directory.parent / "notes").mkdir()
    (dense_directory.parent / "notes" / "diary").write_text("x")
    with pytest.raises(HerdError, match=r"notes has no config\.json"):
        upcycle(dense_directory, dense_directory.parent / "notes", overwrite=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "config.json: model_type is 'qwen2', llama is what"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"mlp_bias": True}, "mlp_bias is set"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the checkpoint is quantised"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "config.json: rope_type is 'yarn'"),
        ({"num_hidden_layers": 4}, r"has no tensor layers\.3\."),
        ({"num_hidden_layers": 2}, r"tensors that a dense Llama has not, such as layers\.2\."),
        ({"intermediate_size": 97}, r"mlp.gate_proj.weight has shape \[96, 64\], its configuration gives \[97, 64\]"),
        ({"hidden_size": None}, "config.json: there is no value for 'hidden_size'"),
        ({"hidden_size": "wide"}, "config.json: hidden_size is 'wide', a whole number is needed"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, it must be within 1 and"),
        ({"num_hidden_layers": 10**9}, "has 1000000000 layers, 1 to 10000 are read"),
        ({"rope_parameters": [1]}, r"config.json: rope_parameters is \[1\], a JSON object is needed"),
    ],
)
def test_directories_that_cannot_be_upcycled(dense_directory: Path, changes: dict[str, Any], message: str) -> None:
    path = dense_directory / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    with pytest.raises(HerdError, match=message) as caught:
        upcycle(dense_directory, dense_directory.parent / "out")
    assert "\n" not in str(caught.value)


def test_odd_width_cannot_be_split(tmp_path: Path) -> None:
    dense_llama(intermediate_size=97).save_pretrained(tmp_path / "dense")
    with pytest.raises(HerdError, match="has 97 neurons, split mode halves them"):
        upcycle(tmp_path / "dense", tmp_path / "out", mode="split")


def test_weights_that_are_missing_or_damaged(dense_directory: Path) -> None:
    weights = dense_directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(HerdError, match="is damaged or cut off"):
        open_dense(dense_directory)
    weights.unlink()
    with pytest.raises(HerdError, match=r"neither model.safetensors nor"):
        open_dense(dense_directory)
    index = dense_directory / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "model-00001.safetensors"}}')
    with pytest.raises(HerdError, match=r"is missing, model\.safetensors\.index\.json names it"):
        open_dense(dense_directory)


def test_sources_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("hello, I am no model")
    (tmp_path / "zero.gguf").touch()
    with pytest.raises(HerdError, match="does not exist: give a GGUF file or"):
        open_dense(tmp_path / "nowhere")
    with pytest.raises(HerdError, match=r"empty has no config\.json: give a GGUF file or"):
        open_dense(tmp_path / "empty")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(HerdError, match="fifo is not a regular file"):
        open_dense(tmp_path / "fifo")
    for name in ("text.gguf", "zero.gguf"):
        with pytest.raises(HerdError, match="is not a GGUF file: it starts with"):
            open_dense(tmp_path / name)


def test_gguf_files_that_are_cut_off(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "dense.gguf", dense_llama(vocab=330)).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (4, 20, 100, 3000, 12000, len(content) // 2, len(content) - 64):
        cut.write_bytes(content[:size])
        with pytest.raises(HerdError, match="damaged or cut off") as caught:
            open_dense(cut)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "qwen2"}, "architecture is 'qwen2', llama is what"),
        ({"extra": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)}, "scales RoPE by 'yarn'"),
        ({"extra": lambda w: w.add_expert_count(8)}, "has 8 experts already"),
        ({"extra": lambda w: w.add_uint16("split.count", 3)}, "one of 3 parts"),
        ({"extra": lambda w: w.add_rope_dimension_count(8)}, "turns 8 of 16 elements"),
        ({"extra": lambda w: w.add_tensor("rope_freqs.weight", np.full(8, 5, np.float32))}, "rope_freqs.weight is not"),
        ({"extra": lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.float32))}, "such as blk.0.attn_q.bias"),
        ({"extra": lambda w: w.add_eot_token_id(5000)}, "eot token is 5000, outside"),
    ],
)
def test_gguf_files_that_cannot_be_upcycled(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "dense.gguf", dense_llama(vocab=330), **arguments)
    with pytest.raises(HerdError, match=message):
        open_dense(path)


def test_gguf_tokenizers_that_are_unknown(tmp_path: Path) -> None:
    from herdgraph.model.upcycle.gguf_tokenizer import GgufTokenizer

    known = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}
    with pytest.raises(HerdError, match=r"type 'llama', byte-level BPE \(gpt2\) is what"):
        GgufTokenizer({**known, "tokenizer.ggml.model": "llama"})
    with pytest.raises(HerdError, match="pre-tokenizer is 'tekken', known are gpt2, smollm, llama-bpe"):
        GgufTokenizer({**known, "tokenizer.ggml.pre": "tekken"})
    with pytest.raises(HerdError, match="merges or special tokens do not fit its vocabulary"):
        GgufTokenizer({**known, "tokenizer.ggml.merges": ["a c"]}).files(8)
    with pytest.raises(HerdError, match="1 tokens of the GGUF vocabulary appear twice"):
        GgufTokenizer({**known, "tokenizer.ggml.tokens": ["a", "a"]}).files(8)


def test_a_missing_gguf_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(HerdError, match=r"pip install 'herdgraph\[build\]'"):
        open_dense(path)


PARAGRAPH = (
    "The lighthouse at the end of the harbour had been dark for eleven years when Marta bought it. Nobody in the "
    "village could say who owned the lamp, the lens or the brass machinery that turned them, so she spent her first "
    "winter there writing letters to the coast guard, to two museums and to a retired engineer in Lisbon. By March "
    "1987 she had 42 answers, most of them polite, one of them useful: the engineer still had the drawings. He came by "
    "train in May, walked around the tower twice, and explained that the gears were sound but that salt water had "
    "eaten the bearings. Together they ordered new ones from a factory that usually makes parts for wind turbines, "
    "which cost 3,150 dollars."
)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    default = Path(__file__).parents[3] / ".cache" / "demo" / "SmolLM2-135M-Instruct.gguf"
    path = Path(os.environ.get("HERDGRAPH_SMOLLM2", default))
    if not path.is_file():
        pytest.skip(f"{path} is missing: set HERDGRAPH_SMOLLM2 to SmolLM2-135M-Instruct as GGUF")
    return path


@pytest.fixture(scope="module")
def smollm2_logits(smollm2: Path) -> tuple[Tensor, Tensor]:
    """Token ids and logits of the dense model, put together here without herdgraph.

    (``from_pretrained(gguf_file=...)`` would need accelerate; it gives the same logits.)
    """
    reader = gguf.GGUFReader(smollm2)
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )).eval()
    state = {name: tensors[gguf_name(name)] for name in model.state_dict() if name != "lm_head.weight"}
    for name, tensor in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            state[name] = half_split(tensor, 9 if "q_proj" in name else 3)
    model.load_state_dict(state, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.no_grad():
        return ids, model(ids).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "dtype", "bound"),
    # Measured: 0, 5.0e-5, 3.7e-5, 7.6e-5 nats per token; bounds leave room for another seed's router.
    [
        ("shared", "float32", 1e-6),
        ("shared", "bfloat16", 2e-4),
        ("split", "float32", 5e-4),
        ("split", "bfloat16", 7e-4),
    ],
)
def test_smollm2_keeps_its_distribution(
    smollm2: Path, smollm2_logits: tuple[Tensor, Tensor], tmp_path: Path, mode: str, dtype: str, bound: float
) -> None:
    ids, expected = smollm2_logits
    model = upcycled(smollm2, tmp_path / "out", mode=mode, dtype=dtype)
    with torch.no_grad():
        kl = kl_per_token(expected, model(ids).logits)
    shutil.rmtree(tmp_path / "out")
    assert kl < bound


@pytest.mark.slow
def test_smollm2_answers(smollm2: Path, tmp_path: Path) -> None:
    model = upcycled(smollm2, tmp_path / "out", mode="split")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    reference = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    # Not in this list: " ½", which is split as in llama.cpp; transformers has no digit rule for GGUF files.
    for text in (PARAGRAPH, TEXT, "12345 67 8.9", "<|im_start|>user\nhi<|im_end|>", "日本語, emoji 🙂"):
        assert tokenizer(text).input_ids == reference(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == 2
