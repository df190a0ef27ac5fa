"""A tokenizer of one's own, and the calf's configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from examples.calf.config import IMAGE_SIZE, calf_config
from examples.calf.tokenizer import NAMED_SPECIAL_TOKENS, save_processor, special_ids, train_tokenizer
from herdgraph.errors import HerdError
from herdgraph.model.config import HerdConfig, from_hf, to_hf
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.processing import PromptProcessor
from herdgraph.model.processing.special import SPECIAL_TOKENS

TEXTS = [f"The cows of herd {n} graze on meadow {n % 7}, and the calf's mother isn't far." for n in range(200)]
SIZE = 400


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "files"
    save_processor(path, train_tokenizer(TEXTS, SIZE), image_size=IMAGE_SIZE)
    return path


@pytest.fixture(scope="module")
def processor(directory: Path) -> PromptProcessor:
    return PromptProcessor(directory, calf_config(SIZE))


def test_special_tokens_stand_at_the_end(processor: PromptProcessor) -> None:
    ids = special_ids(SIZE)
    assert list(ids.values()) == list(range(SIZE - len(NAMED_SPECIAL_TOKENS), SIZE))
    assert [SPECIAL_TOKENS.index(token) for token in ids] == sorted(map(SPECIAL_TOKENS.index, ids))
    tokenizer = processor.tokenizer
    assert tokenizer.vocab_size == SIZE
    assert {token: tokenizer.token_to_id(token) for token in ids} == ids
    assert tokenizer.stop_ids == {ids["<|end_of_text|>"], ids["<|eom|>"], ids["<|eot|>"]}
    assert tokenizer.bos_id == ids["<|begin_of_text|>"]


@pytest.mark.parametrize("text", [TEXTS[0], "", "  spaces\n\n\ttabs ", "Größe 牛 🐄 \x00", "<|eot|>", "1234567"])
def test_any_text_comes_back(text: str, processor: PromptProcessor) -> None:
    ids = processor.tokenizer.encode(text)
    assert processor.tokenizer.decode(ids, skip_special=False) == text
    assert not set(ids) & set(processor.tokenizer.special_ids)


def test_it_learned_something(processor: PromptProcessor) -> None:
    assert len(processor.tokenizer.encode(TEXTS[5])) < len(TEXTS[5]) / 2
    assert processor.tokenizer.encode(" cows") == processor.tokenizer.encode("x cows")[1:]


def test_a_small_text_gives_the_same_size() -> None:
    tokenizer = train_tokenizer(["moo"], SIZE)
    assert tokenizer.get_vocab_size() == SIZE
    assert tokenizer.token_to_id("<|patch|>") == special_ids(SIZE)["<|patch|>"]
    with pytest.raises(HerdError, match="a vocabulary of 270 is too small: bytes and special tokens alone are 277"):
        train_tokenizer(["moo"], 270)


def test_training_is_deterministic() -> None:
    assert train_tokenizer(TEXTS, SIZE).to_str() == train_tokenizer(TEXTS, SIZE).to_str()


def test_transformers_reads_it_alike(directory: Path, processor: PromptProcessor) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    assert theirs(TEXTS[3])["input_ids"] == processor.tokenizer.encode_completion(TEXTS[3])
    messages = [{"role": "user", "content": "moo?"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert processor.template.render(messages) == expected


def test_pictures_and_messages(processor: PromptProcessor) -> None:
    ids = special_ids(SIZE)
    image = Image.new("RGB", (2 * IMAGE_SIZE, IMAGE_SIZE))
    found = processor.prepare([{"role": "user", "content": [{"type": "image", "image": image}]}])
    assert found.token_ids.count(ids["<|patch|>"]) == 3 * 4
    assert found.token_ids.count(ids["<|tile_x_separator|>"]) == 1
    assert found.pixel_values is not None
    assert found.pixel_values.shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_nothing_is_overwritten(directory: Path) -> None:
    with pytest.raises(HerdError, match="exists already"):
        save_processor(directory, train_tokenizer(["moo"], SIZE), image_size=IMAGE_SIZE)


# --- the calf

def parameters(config: HerdConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Llama4(config).parameters())


def test_sizes_of_the_calf() -> None:
    assert 4e6 < parameters(calf_config()) < 5e6
    assert 2 * parameters(calf_config(4096)) < 16e6  # bytes in bfloat16


def test_the_calf_is_a_llama_4() -> None:
    config = calf_config()
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config
    text, vision = config.text, config.vision
    assert vision is not None
    assert vision.tokens_per_tile == 4
    assert text.moe_layers
    assert text.use_qk_norm
    assert [not rope for rope in text.rope_layers] == [(layer + 1) % 4 == 0 for layer in range(text.num_layers)]
    assert config.image_token_id == special_ids(text.vocab_size)["<|patch|>"]


def test_the_calf_takes_a_prompt(processor: PromptProcessor) -> None:
    config = calf_config(SIZE)
    prompt = processor.prepare("<|image|> moo", images=[Image.new("RGB", (64, 64), "brown")])
    assert prompt.pixel_values is not None
    logits_BTV = Llama4(config)(torch.tensor([prompt.token_ids]), torch.from_numpy(prompt.pixel_values))
    assert logits_BTV.shape == (1, len(prompt.token_ids), SIZE)
    assert logits_BTV.isfinite().all()
