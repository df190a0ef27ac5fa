"""Tokenizers against llama-models' own and the tokenizers library; streaming against decoding at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import llama_models.llama4.tokenizer as meta
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdgraph.errors import HerdError
from herdgraph.model.processing import StreamDecoder, Tokenizer, load_tokenizer
from support import herds

TEXTS = [
    "", "Hello, world!", "  leading and trailing  ", "two\n\nlines\r\n",
    "ümläut 你好 🦙👩‍👩‍👧 \u200b", "def f(x):\n\treturn x**2",
    "1234567890 ½ ²", "it's WE'LL don't", "a" * 300, " " * 50, "<|eot|> is typed by a user", "Ω≈ç√∫˜µ≤≥÷",
]


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("meta")
    shutil.copy(Path(meta.__file__).parent / "tokenizer.model", directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def reference() -> meta.Tokenizer:
    return meta.Tokenizer.get_instance()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tiny")
    herds.write_processor(directory)
    return load_tokenizer(directory)


def test_vocabulary_matches_llama_models(llama4: Tokenizer, reference: meta.Tokenizer) -> None:
    assert llama4.vocab_size == reference.n_words == 202048
    for token, index in reference.special_tokens.items():
        assert llama4.token_to_id(token) == index
    assert llama4.special_ids == set(reference.special_tokens.values())
    assert llama4.bos_id == 200000
    assert llama4.stop_ids == set(reference.stop_tokens) == {200001, 200007, 200008}
    assert (llama4.token_to_id("<|image|>"), llama4.token_to_id("<|patch|>")) == (200090, 200092)
    assert llama4.token_to_id("no such token at all") is None


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_ids_match_llama_models(text: str, llama4: Tokenizer, reference: meta.Tokenizer) -> None:
    plain = reference.encode(text, bos=False, eos=False) if text else []
    assert llama4.encode(text) == plain
    assert llama4.decode(plain) == text
    special = reference.encode(text, bos=False, eos=False, allowed_special="all") if text else []
    assert llama4.encode(text, allow_special=True) == special
    assert llama4.encode_completion(text) == [200000, *special]


def test_long_runs_do_not_overflow(llama4: Tokenizer) -> None:
    text = "x" * 120_000 + " " * 60_000 + "end"
    assert llama4.decode(llama4.encode(text)) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_streaming_equals_decoding(text: str, llama4: Tokenizer, tiny: Tokenizer) -> None:
    for tokenizer in (llama4, tiny):
        decoder, pieces = StreamDecoder(tokenizer), []
        for token in tokenizer.encode(text):
            pieces.append(decoder.feed(token))
            assert "\ufffd" not in pieces[-1] or "\ufffd" in text, "half a character was shown"
        assert "".join(pieces) + decoder.flush() == text


def test_streaming_shows_control_tokens_where_it_is_asked_to(tiny: Tokenizer) -> None:
    ids = tiny.encode("a<|eot|>b", allow_special=True)
    for skip_special, text in ((True, "ab"), (False, "a<|eot|>b")):
        decoder = StreamDecoder(tiny, skip_special=skip_special)
        assert "".join(map(decoder.feed, ids)) + decoder.flush() == text


def test_streaming_invalid_bytes(tiny: Tokenizer) -> None:
    """Bytes that never become text do not stop the stream."""
    emoji, broken = tiny.encode("🦙"), tiny.encode("é")[:1]
    decoder = StreamDecoder(tiny)
    assert [decoder.feed(token) for token in emoji] == ["", "", "", "🦙"]
    shown = "".join(decoder.feed(token) for token in broken * 40)
    assert shown.count("\ufffd") >= 32, "bytes that never become text do not stop the stream"
    assert decoder.feed(tiny.encode("a")[0]).endswith("a")


def test_streaming_stays_cheap(tiny: Tokenizer) -> None:
    """Work per token must not grow with the text: count decoded ids instead of seconds."""
    decoded = 0
    original = tiny.decode

    def counting(ids: list[int], **options: bool) -> str:
        nonlocal decoded
        decoded += len(ids)
        return original(ids, **options)

    decoder = StreamDecoder(tiny)
    tiny.decode = counting  # type: ignore[method-assign]
    try:
        for token in tiny.encode("abc" * 1000):
            decoder.feed(token)
    finally:
        del tiny.decode  # type: ignore[method-assign]
    assert decoded < 10 * 3000


def test_encode_typed_special_tokens(tiny: Tokenizer) -> None:
    """What a user types never becomes a special token."""
    ids = tiny.encode("<|eot|>")
    assert len(ids) == 7
    assert not set(ids) & tiny.special_ids
    assert tiny.encode("<|eot|>", allow_special=True) == [508]


def test_stop_ids(tmp_path: Path) -> None:
    """They are collected from all files and from the configuration."""
    herds.write_processor(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_tokenizer(tmp_path, eos_ids=(11,)).stop_ids == {2, 508, 7, 9, 11}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert 5 in load_tokenizer(tmp_path).stop_ids


def test_encode_completion_begin_of_text(tmp_path: Path, tiny: Tokenizer) -> None:
    assert tiny.encode_completion("a") == tiny.encode("a")
    herds.write_processor(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    wants = load_tokenizer(tmp_path)
    assert wants.encode_completion("a") == [1, *tiny.encode("a")]
    assert wants.encode_completion("<|begin_of_text|>a") == [1, *tiny.encode("a")]


def test_load_tokenizer_refusals(tmp_path: Path) -> None:
    with pytest.raises(HerdError, match=r"has no tokenizer\.json or tokenizer\.model: .* add it"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("not base64 at all\n")
    with pytest.raises(HerdError, match="is not a tiktoken vocabulary"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(HerdError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(HerdError, match="cannot be read as JSON"):
        load_tokenizer(tmp_path)


def test_panics_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Tokenizer) -> None:
    """A panic of Rust is no ``Exception``: it would pass a server's handlers."""
    panic = type("PanicException", (BaseException,), {})

    def fail(*_: object, **__: object) -> None:
        raise panic("Onig: retry-limit-in-match over")

    monkeypatch.setattr(tiny._codec, "encode", fail)
    with pytest.raises(HerdError, match="reading the text into tokens failed inside of a library: Onig"):
        tiny.encode("x")
    monkeypatch.setattr(tiny._codec, "decode", fail)
    with pytest.raises(HerdError, match="turning tokens into text failed"):
        tiny.decode([1])


@pytest.mark.parametrize("character", [" ", "x", "\n"])
def test_long_runs_are_cut(character: str, calf: Tokenizer) -> None:
    """The regular expression of a ``tokenizer.json`` gives up on some million blanks."""
    text = "a" + character * 250_000 + "b"
    assert calf.decode(calf.encode(text)) == text


@pytest.fixture(scope="module")
def calf() -> Tokenizer:
    return load_tokenizer(Path(__file__).parents[3] / "examples" / "calf" / "checkpoint")


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=80) | st.sampled_from(["<|eot|>" * 9, " " * 500, "é" * 90]))
def test_least_number_of_tokens(text: str, llama4: Tokenizer, calf: Tokenizer) -> None:
    """A text is refused before it is read into tokens only when it cannot have as few."""
    for tokenizer in (llama4, calf):
        ids = tokenizer.encode(text, allow_special=True)
        tokenizer.require_room(text, len(ids))
        assert tokenizer._codec.longest_token is not None
    with pytest.raises(HerdError, match="the text has 100000 characters, which are more than"):
        calf.require_room("x" * 100_000, 100)


def test_vocabularies_that_lose_bytes(tmp_path: Path) -> None:
    """Of them nothing is said beforehand."""
    herds.write_processor(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for change in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": {"type": "Whitespace"}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer._codec.longest_token is None
        tokenizer.require_room("x" * 100_000, 1)


def test_texts_that_only_control_tokens_spell(tmp_path: Path) -> None:
    """A vocabulary whose ordinary words include a control token cannot keep what is typed apart from it."""
    herds.write_processor(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<pad>"}
    content["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(HerdError, match="holds a special token, which this vocabulary cannot spell"):
        load_tokenizer(tmp_path).encode("a <|eot|>")
