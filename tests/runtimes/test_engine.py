"""The engine as applications use it: sequences, text, streaming, stops, images, errors."""

from __future__ import annotations

import os
import signal
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from herdgraph.errors import HerdError, StoppedError
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.verify import random_prompt
from herdgraph.files import size
from herdgraph.interruption import Interrupted, signals_unwind
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.processing import GenerationDefaults, PreparedPrompt
from herdgraph.runtimes import Engine, Sampling, Sequence
from herdgraph.runtimes.executors.runner import PREFILL_CHUNK
from herdgraph.runtimes.generation import Request
from support import clips, herds

CHUNK = TINY.text.attention_chunk_size
CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engine")
    herds.save(TINY, directory / "checkpoint")
    herds.write_processor(directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        build_bundle(checkpoint, directory / "bundle")
    return directory / "bundle"


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return Engine.load(bundle, threads=1)


def _logits(engine: Engine, ids: list[int]) -> np.ndarray:
    return engine.prefill(engine.new_sequence(), ids)


# -- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [0, 1])
def test_a_prompt_that_is_stopped_ends_after_a_chunk_and_goes_on_there(
    images: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, pixels = random_prompt(engine.config, 4 * CHUNK, images=images)
    computed: list[int] = []
    real = engine._decoder.prefill_chunk

    def counted(sequence: Sequence, token_ids: list[int], *rest: Any) -> np.ndarray:
        computed.append(len(token_ids))
        return real(sequence, token_ids, *rest)

    monkeypatch.setattr(engine._decoder, "prefill_chunk", counted)
    sequence = engine.new_sequence()
    told = rf"stopped after {2 * CHUNK} of {len(prompt)} tokens"
    with sequence.stopped_by(lambda: len(computed) == 2), pytest.raises(StoppedError, match=told):
        engine.prefill(sequence, prompt, pixels)
    assert computed == [CHUNK, CHUNK]
    assert sequence.token_ids == prompt[: 2 * CHUNK]
    assert len(sequence.features) == prompt[: 2 * CHUNK].count(engine.config.image_token_id)
    request = Request(engine, engine.decode, sequence, PreparedPrompt(prompt, pixels))
    logits, cached = request.prefill()
    assert cached <= 2 * CHUNK
    np.testing.assert_allclose(logits, engine.prefill(engine.new_sequence(), prompt, pixels), atol=1e-4)


def test_a_signal_acts_between_chunks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `herdgraph generate`: Python's handler runs when a chunk's call is back."""
    computed: list[int] = []
    real = engine._decoder.prefill_chunk

    def signaled(*args: Any) -> np.ndarray:
        computed.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(engine._decoder, "prefill_chunk", signaled)
    with pytest.raises(Interrupted), signals_unwind():
        engine.generate(list(range(4 * CHUNK)))
    assert computed == [1]


# -- sequences -------------------------------------------------------------------------------------------------------


def test_prefill_chunks_never_cross_an_attention_chunk(engine: Engine) -> None:
    for start in (0, 1, CHUNK - 1, CHUNK, 5 * CHUNK + 3):
        pieces = engine._decoder.chunk_prompt(start, list(range(3 * PREFILL_CHUNK)))
        assert list(chain(*pieces)) == list(range(3 * PREFILL_CHUNK))
        at = start
        for piece in pieces:
            assert 1 <= len(piece) <= PREFILL_CHUNK
            assert at // CHUNK == (at + len(piece) - 1) // CHUNK
            at += len(piece)


@pytest.mark.parametrize("prefix", [5, CHUNK, CHUNK + 3])
def test_a_fork_is_independent(prefix: int, engine: Engine) -> None:
    ids = herds.tokens(60)
    sequence = engine.new_sequence()
    engine.prefill(sequence, ids[:prefix])
    twin = sequence.fork()
    engine.prefill(twin, herds.tokens(30, seed=5))
    np.testing.assert_allclose(engine.prefill(sequence, ids[prefix:]), _logits(engine, ids), atol=1e-5)
    expected = _logits(engine, ids[:prefix] + herds.tokens(30, seed=5) + [7])
    np.testing.assert_allclose(engine.decode(twin, 7), expected, atol=1e-5)


# Inside the current chunk, at its edge, and back into chunks whose slots were overwritten.
@pytest.mark.parametrize("length", [0, 1, CHUNK - 1, CHUNK, CHUNK + 5, 2 * CHUNK, 39, 49, 50])
def test_truncation_restores_the_past(length: int, engine: Engine) -> None:
    ids, other = herds.tokens(50), herds.tokens(20, seed=9)
    sequence = engine.new_sequence()
    engine.prefill(sequence, ids)
    engine.truncate(sequence, length)
    assert sequence.token_ids == ids[:length]
    np.testing.assert_allclose(engine.prefill(sequence, other), _logits(engine, ids[:length] + other), atol=1e-5)


def test_truncation_with_images(engine: Engine) -> None:
    image = [TINY.image_token_id] * 4
    ids = herds.tokens(3) + image + herds.tokens(2) + image + herds.tokens(2 * CHUNK)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 28, 28)).astype(np.float32)
    sequence, tail = engine.new_sequence(), herds.tokens(5, seed=3)
    engine.prefill(sequence, ids, pixels)
    engine.truncate(sequence, 8)  # back into the first chunk: three tokens and the first picture are run again
    expected = engine.prefill(engine.new_sequence(), ids[:8] + tail, pixels[:1])
    np.testing.assert_allclose(engine.prefill(sequence, tail), expected, atol=1e-5)


def test_caches_grow_with_the_sequence_and_stop_at_the_chunk(engine: Engine) -> None:
    sequence = engine.new_sequence()
    engine.prefill(sequence, herds.tokens(600))
    assert (len(sequence.cache.whole.numbers), len(sequence.cache.chunked.numbers)) == (10, 1), "blocks of 64 tokens"
    for token in herds.tokens(450, seed=2):
        last = engine.decode(sequence, token)
    np.testing.assert_allclose(last, _logits(engine, herds.tokens(600) + herds.tokens(450, seed=2)), atol=1e-5)


def test_decode_results_stay(engine: Engine) -> None:
    sequence = engine.new_sequence()
    first = engine.decode(sequence, 5)
    kept = first.copy()
    engine.decode(sequence, 6)
    np.testing.assert_array_equal(first, kept)


# -- text ------------------------------------------------------------------------------------------------------------


def test_stream_is_generate_and_greedy_repeats(engine: Engine) -> None:
    options = {"max_new_tokens": 24, "stop_ids": []}
    whole = engine.generate("Once upon", **options)
    stream = engine.stream("Once upon", **options)
    pieces = list(stream)
    assert "".join(pieces) == whole.text == stream.result.text
    assert stream.result.token_ids == whole.token_ids
    assert len(whole.token_ids) == 24
    assert whole.finish_reason == "length"
    assert all(pieces), "no empty pieces"
    assert whole.timings.new_tokens == 24
    assert whole.timings.prefill_seconds > 0


def test_greedy_follows_the_logits(engine: Engine) -> None:
    prepared = engine.processor.prepare("Once upon")
    ids, sequence = [], engine.new_sequence()
    logits = engine.prefill(sequence, prepared.token_ids)
    for _ in range(8):
        ids.append(int(logits.argmax()))
        logits = engine.decode(sequence, ids[-1])
    assert engine.generate("Once upon", max_new_tokens=8, stop_ids=[]).token_ids == ids


def test_seeds(engine: Engine) -> None:
    options = {"max_new_tokens": 16, "temperature": 2.0, "stop_ids": []}
    first, again, other = (engine.generate(CHAT, seed=seed, **options).token_ids for seed in (1, 1, 2))
    assert first == again != other


def test_stop_ids_and_strings(engine: Engine) -> None:
    options = {"max_new_tokens": 32, "temperature": 1.5, "seed": 3}
    free = engine.generate("abc", stop_ids=[], **options)
    stopped = engine.generate("abc", stop_ids=[free.token_ids[5]], **options)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[5]) + 1]
    middle = free.text[len(free.text) // 2 :][:2]
    by_string = engine.generate("abc", stop_ids=[], stop=[middle], **options)
    assert by_string.finish_reason == "stop"
    assert by_string.text == free.text[: free.text.index(middle)]


def test_logprobs_are_of_the_chosen_tokens(engine: Engine) -> None:
    result = engine.generate("abc", max_new_tokens=4, logprobs=2, stop_ids=[])
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    assert all(entry.top[0].token_id == entry.token_id and len(entry.top) == 2 for entry in result.logprobs)
    assert all(entry.text == engine.processor.tokenizer.decode([entry.token_id], skip_special=False)
               for entry in result.logprobs)


def test_a_conversation_computes_only_what_is_new(engine: Engine) -> None:
    sequence = engine.new_sequence()
    first = engine.generate(CHAT, sequence=sequence, max_new_tokens=6, stop_ids=[])
    messages = [*CHAT, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And now something longer?"}]
    second = engine.generate(messages, sequence=sequence, max_new_tokens=6, stop_ids=[])
    assert first.timings.cached_tokens == 0
    assert second.timings.cached_tokens >= first.timings.prompt_tokens - 1
    assert second.token_ids == engine.generate(messages, max_new_tokens=6, stop_ids=[]).token_ids


def test_generation_ends_with_the_context(bundle: Path) -> None:
    engine = Engine.load(bundle, threads=1)
    room = 5
    prompt = "x" * (TINY.text.max_position_embeddings - room)
    result = engine.generate(prompt, max_new_tokens=100, stop_ids=[])
    assert len(result.token_ids) == room
    assert result.finish_reason == "length"


# -- images ----------------------------------------------------------------------------------------------------------


def _picture(color: str, width: int = 40, height: int = 28) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def _ask(*pictures: Image.Image) -> list[dict[str, object]]:
    parts: list[dict[str, object]] = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]


def test_images_in_messages(engine: Engine) -> None:
    red, blue = (engine.generate(_ask(_picture(c)), max_new_tokens=8, stop_ids=[], logprobs=1) for c in ("red", "blue"))
    assert red.logprobs[0].logprob != blue.logprobs[0].logprob
    both = engine.generate(_ask(_picture("red"), _picture("blue")), max_new_tokens=1)
    assert both.timings.prompt_tokens > red.timings.prompt_tokens


def test_frames_of_a_video_are_remembered_by_content(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again, and in another film, a frame is not computed again."""
    runner = engine._vision
    assert runner is not None
    calls: list[int] = []
    compute = runner._computed
    monkeypatch.setattr(runner, "_computed", lambda tiles: calls.append(len(tiles)) or compute(tiles))
    colors = ["orange", "purple", "navy"]
    for shown in (colors, colors, [colors[1], "teal"]):
        video = {"type": "video", "data": clips.animation([_picture(color) for color in shown], kind="gif")}
        found = engine.generate([{"role": "user", "content": [video, {"type": "text", "text": "What comes first?"}]}],
                                max_new_tokens=2)
        assert found.token_ids
    assert calls == [3, 0, 1]


def test_another_picture_is_not_taken_for_the_same_prefix(engine: Engine) -> None:
    sequence = engine.new_sequence()
    options = {"max_new_tokens": 4, "stop_ids": [], "logprobs": 1}
    engine.generate(_ask(_picture("red")), sequence=sequence, **options)
    again = engine.generate(_ask(_picture("red")), sequence=sequence, **options)
    other = engine.generate(_ask(_picture("blue")), sequence=sequence, **options)
    assert again.timings.cached_tokens > 8
    assert other.timings.cached_tokens < again.timings.cached_tokens
    fresh = engine.generate(_ask(_picture("blue")), **options)
    assert other.logprobs[0].logprob == pytest.approx(fresh.logprobs[0].logprob, abs=1e-5)


# -- wrong inputs ----------------------------------------------------------------------------------------------------


def test_wrong_tokens(engine: Engine) -> None:
    with pytest.raises(HerdError, match="no tokens were given"):
        engine.prefill(engine.new_sequence(), [])
    with pytest.raises(HerdError, match="token id 512 is outside of the vocabulary of 512"):
        engine.decode(engine.new_sequence(), 512)
    with pytest.raises(HerdError, match="4097 tokens are more than the context of 4096"):
        engine.prefill(engine.new_sequence(), [5] * 4097)
    with pytest.raises(HerdError, match="cannot truncate a sequence of 0 tokens to 3"):
        engine.truncate(engine.new_sequence(), 3)


def test_wrong_images(engine: Engine) -> None:
    image = [TINY.image_token_id] * 4
    with pytest.raises(HerdError, match="0 image tiles fill 0 image tokens, the prompt has 4"):
        engine.prefill(engine.new_sequence(), image)
    with pytest.raises(HerdError, match="0 image tiles fill 0 image tokens, the prompt has 1"):
        engine.decode(engine.new_sequence(), TINY.image_token_id)
    with pytest.raises(HerdError, match=r"float32 \[1, 3, 20, 20\], float32 \[tiles, 3, 28, 28\] is needed"):
        engine.prefill(engine.new_sequence(), image, np.zeros((1, 3, 20, 20), np.float32))


@pytest.mark.parametrize(("options", "message"), [
    ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"temperature": -1}, "temperature is -1"),
    ({"stop": [""]}, "a stop string is ''"), ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"stop": 5}, "stop is 5"), ({"sequence": "x"}, "sequence is 'x'"), ({"images": 1.5}, "images is 1.5"),
    ({"tools": 5}, "tools is 5, a list is needed"),
    ({"images": ["x.png"]}, "image"),
])
def test_wrong_options(options: dict[str, object], message: str, engine: Engine) -> None:
    with pytest.raises(HerdError, match=message):
        engine.generate("abc", **options)


def test_empty_prompt_and_threads(engine: Engine, bundle: Path) -> None:
    with pytest.raises(HerdError, match="empty"):
        engine.generate("")
    with pytest.raises(HerdError, match="threads is 0"):
        Engine.load(bundle, threads=0)


def test_wrong_names_are_refused_by_python(engine: Engine) -> None:
    with pytest.raises(TypeError, match="max_new_tokns"):
        engine.generate("abc", max_new_tokns=3)


def test_sampling_defaults_are_the_checkpoints(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``generation_config.json`` recommends holds until a caller says otherwise."""
    recommended = GenerationDefaults(temperature=0.7, top_k=5)
    monkeypatch.setitem(engine.processor.__dict__, "generation_defaults", recommended)
    assert engine.stream("abc")._sampler.options == Sampling(temperature=0.7, top_k=5)
    assert engine.stream("abc", temperature=0, seed=3)._sampler.options == Sampling(temperature=0, top_k=5, seed=3)


def test_prompts_of_token_ids(engine: Engine) -> None:
    text, options = "Once upon", {"max_new_tokens": 4, "stop_ids": []}
    ids = engine.processor.tokenizer.encode_completion(text)
    wanted = engine.generate(text, **options)
    assert engine.generate(ids, **options).token_ids == wanted.token_ids
    assert engine.generate(tuple(np.array(ids)), **options).token_ids == wanted.token_ids
    for wrong, problem in (([1, "x"], "a token id is 'x'"), ([1, None], "a token id is None"), ([], "empty"),
                           ([1, 2.0], "a token id is 2.0"),
                           ([1, 10**9], "outside of the vocabulary"), ([TINY.image_token_id], "0 image tiles")):
        with pytest.raises(HerdError, match=problem):
            engine.generate(wrong)
    with pytest.raises(HerdError, match="takes no images"):
        engine.generate([1, 2], images=[_picture("red")])


def test_image_tokens_are_never_chosen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture's token in an answer would stand for no features."""
    real = engine._decoder.decode

    def prefer_images(sequence, token):
        logits = real(sequence, token).copy()
        logits[TINY.image_token_id] = 1e9
        return logits

    monkeypatch.setattr(engine._decoder, "decode", prefer_images)
    assert TINY.image_token_id not in engine.generate("abc", max_new_tokens=5, stop_ids=[]).token_ids


def test_one_sequence_has_one_user(engine: Engine) -> None:
    sequence = engine.new_sequence()
    with sequence.exclusive():
        for use in (lambda: engine.decode(sequence, 5), lambda: engine.prefill(sequence, [5]), sequence.fork,
                    lambda: engine.truncate(sequence, 0), lambda: engine.decode_batch([sequence], [5])):
            with pytest.raises(HerdError, match="two threads used one sequence"):
                use()
    streams = [iter(engine.stream(text, sequence=sequence, stop_ids=[])) for text in ("abc", "abd")]
    for stream in streams:
        next(stream)
    with pytest.raises(HerdError, match="used by somebody else"):
        list(streams[0])
    assert len(engine.generate("abc", sequence=sequence, max_new_tokens=2, stop_ids=[]).token_ids) == 2


def test_a_closed_engine_refuses_and_frees(bundle: Path) -> None:
    with Engine.load(bundle, threads=1) as engine:
        sequence = engine.new_sequence()
        session = weakref.ref(engine._decoder.graph)
        assert repr(engine) == f"<Engine {str(bundle)!r}: cpu fp32, 4 layers, 4 experts, {size(engine.bundle.bytes)}>"
    assert repr(engine).endswith(", closed: the engine was closed>")
    assert session() is None
    for use in (lambda: engine.generate("abc"), lambda: engine.decode(sequence, 5),
                lambda: engine.prefill(sequence, [5]), lambda: engine.truncate(sequence, 0),
                lambda: engine.decode_batch([sequence], [5])):
        with pytest.raises(HerdError, match="the engine was closed: load the bundle again"):
            use()
    engine.close()


# -- what is remembered, and what is bounded ---------------------------------------------------------------------------


def test_features_of_a_picture_are_computed_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = engine._vision
    assert runner is not None
    calls: list[int] = []
    compute = runner._computed
    monkeypatch.setattr(runner, "_computed", lambda tiles: calls.append(len(tiles)) or compute(tiles))
    tiles = np.random.default_rng(5).normal(size=(6, 3, 28, 28)).astype(np.float32)
    tiles[5] = tiles[1]
    first, again = runner.features(tiles), runner.features(tiles[::-1].copy())
    assert calls == [5, 0], "five different tiles, then none"
    per_tile = len(first) // 6
    np.testing.assert_array_equal(again.reshape(6, per_tile, -1)[::-1].reshape(first.shape), first)
    np.testing.assert_allclose(runner.features(tiles[2:3]), first[2 * per_tile : 3 * per_tile])
    monkeypatch.setattr("herdgraph.runtimes.executors.vision.IMAGE_CACHE_BYTES", 2 * first.nbytes // 6)
    runner.features(np.zeros((1, 3, 28, 28), np.float32))
    assert len(runner._cache) == 2


def test_threads_with_sequences_of_their_own_get_what_each_gets_alone(engine: Engine) -> None:
    """Arrays that a call reads and writes are kept for the next call of the same thread, never of another."""
    prompts = [herds.tokens(24, seed) for seed in (1, 2)]

    def decoded(ids: list[int]) -> np.ndarray:
        sequence = engine.new_sequence()
        engine.prefill(sequence, ids[:8])
        return np.stack([engine.decode(sequence, token) for token in ids[8:]])

    alone = [decoded(ids) for ids in prompts]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            for found, wanted in zip(pool.map(decoded, prompts), alone, strict=True):
                np.testing.assert_array_equal(found, wanted)
