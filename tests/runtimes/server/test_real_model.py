"""The whole server on a real model: OpenAI's client gets what the engine says alone, whatever others ask meanwhile."""

from __future__ import annotations

import base64
import io
import json
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from herdgraph.runtimes import Engine
from herdgraph.runtimes.scheduler import Service
from support.command_line import run


@pytest.fixture(scope="module")
def engine(chunked_bundle: Path) -> Engine:
    """For answers that somebody gets alone."""
    return Engine.load(chunked_bundle, threads=1)


@pytest.fixture(scope="module")
def client(real_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real_url}/v1", api_key="none", max_retries=0)


def _link(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _picture() -> tuple[Image.Image, str]:
    """A picture, and as a URL."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8))
    picture.save(file := io.BytesIO(), "PNG")
    return picture, _link(file.getvalue())


QUESTIONS = ("What is the capital of France?", "What is a dictionary?", "Tell me about cats and dogs.", "What is 1?")


def test_concurrent_streams_are_what_the_engine_says_alone(engine: Engine, client: openai.OpenAI) -> None:
    """Greedy texts, some after others' prefixes, some with a picture."""
    picture, link = _picture()
    asked: list[tuple[Any, Any]] = [(text, text) for text in QUESTIONS * 3]
    asked.append(([{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}],
                  [{"type": "image_url", "image_url": {"url": link}}, {"type": "text", "text": "What is this?"}]))
    wanted = [engine.generate([{"role": "user", "content": ours}], max_new_tokens=24, temperature=0).text
              for ours, _ in asked]

    def answer(content: Any) -> str:
        stream = client.chat.completions.create(
            model="calf", messages=[{"role": "user", "content": content}], max_tokens=24, temperature=0, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(answer, [theirs for _, theirs in asked])) == wanted


def test_the_command_line_gets_what_the_engine_says(engine: Engine, real_url: str, tmp_path: Path) -> None:
    """A chat with a picture, and a text that goes on: texts, ids, log-probabilities and counts."""
    picture, _ = _picture()
    picture.save(tmp_path / "cow.png")
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0, "logprobs": 2, "stop": "e"}
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTIONS[0]}]
    chat, text = engine.generate([{"role": "user", "content": parts}], **options), engine.generate("Once", **options)
    words = ("-n", 12, "--temperature", 0, "--stop", "e", "--json", "--logprobs", 2)
    for wanted, asked in ((chat, (QUESTIONS[0], "--image", tmp_path / "cow.png")), (text, ("Once", "--raw"))):
        told = json.loads(run("generate", "--url", real_url, *asked, *words).stdout)
        assert (told["text"], told["token_ids"], told["finish_reason"]) == (
            wanted.text, wanted.token_ids, wanted.finish_reason)
        assert told["timings"]["prompt_tokens"] == wanted.timings.prompt_tokens
        assert [entry["text"] for entry in told["logprobs"]] == [entry.text for entry in wanted.logprobs]
        assert [entry["logprob"] for entry in told["logprobs"]] == pytest.approx(
            [entry.logprob for entry in wanted.logprobs], abs=1e-4)


def test_cached_prefixes_are_told(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Once upon a time there was a farm. " * 12}]
    usages = [client.chat.completions.create(model="calf", messages=messages, max_tokens=2).usage for _ in range(2)]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages if usage and usage.prompt_tokens_details]
    assert cached[0] == 0
    assert cached[1] is not None
    assert cached[1] >= 64


def test_prompts_echo_with_their_logprobs(engine: Engine, client: openai.OpenAI) -> None:
    """As lm-eval asks for log-likelihoods."""
    ids = engine.processor.tokenizer.encode_completion("The cat sat on the mat.")
    found = client.completions.create(model="calf", prompt=ids, echo=True, logprobs=1, max_tokens=0, temperature=0)
    logits = engine.prefill(engine.new_sequence(), ids, all_positions=True).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    told = found.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert told.token_logprobs[0] is None
    np.testing.assert_allclose(told.token_logprobs[1:], [logprobs[at, token] for at, token in enumerate(ids[1:])],
                               atol=1e-5)


SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
          "required": ["city", "people"], "additionalProperties": False}
TOOLS: list[Any] = [{"type": "function", "function": {
    "name": "look_up", "parameters": {"type": "object", "properties": {"word": {"enum": ["cat", "dog"]}},
                                      "required": ["word"]}}}]


def test_structured_output_and_tool_calls_hold_in_company(client: openai.OpenAI) -> None:
    def structured(seed: int) -> Any:
        answer = client.chat.completions.create(
            model="calf", messages=[{"role": "user", "content": f"Paris {seed}"}], max_tokens=200, seed=seed,
            temperature=1, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}})
        assert answer.choices[0].finish_reason == "stop"
        return json.loads(answer.choices[0].message.content or "")

    def called(seed: int) -> list[Any]:
        answer = client.chat.completions.create(
            model="calf", messages=[{"role": "user", "content": f"cat {seed}"}], tools=TOOLS, tool_choice="required",
            parallel_tool_calls=False, max_tokens=100, seed=seed, temperature=1)
        assert answer.choices[0].finish_reason == "tool_calls"
        return [json.loads(call.function.arguments)  # type: ignore[union-attr]
                for call in answer.choices[0].message.tool_calls or ()]

    with ThreadPoolExecutor(8) as pool:
        objects, calls = pool.map(structured, range(4)), pool.map(called, range(4))
        assert all(set(found) == {"city", "people"} for found in objects)
        assert all(arguments in ([{"word": "cat"}], [{"word": "dog"}]) for arguments in calls)


def test_a_format_beside_tools_that_may_be_called(client: openai.OpenAI) -> None:
    """Streamed and not, by draws: the answer is JSON of the schema or calls, and the same both ways."""
    asked: Any = {
        "model": "calf", "tools": TOOLS, "parallel_tool_calls": False, "max_tokens": 200, "temperature": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
    kinds = set()
    for seed in range(6):
        asked |= {"seed": seed, "messages": [{"role": "user", "content": f"cat {seed}"}],
                  "logit_bias": {"91": 10} if seed % 2 else {}}  # a bracket, which begins calls
        choice = client.chat.completions.create(**asked).choices[0]
        deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(stream=True, **asked)]
        calls = [call.function for delta in deltas for call in delta.tool_calls or ()]
        assert "".join(delta.content or "" for delta in deltas) == (choice.message.content or "")
        assert "".join(call.arguments or "" for call in calls if call) == "".join(
            call.function.arguments for call in choice.message.tool_calls or ())  # type: ignore[union-attr]
        kinds.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            assert set(json.loads(choice.message.content or "")) == {"city", "people"}
        else:
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content is None
    assert kinds == {"stop", "tool_calls"}


@pytest.mark.parametrize(("options", "reason"), [
    ({"allowed_token_ids": [508], "min_tokens": 4}, "no token may come next"),
    ({"stop_token_ids": [99999], "min_tokens": 4}, "stop_token_ids has token id 99999, the vocabulary has 512"),
    ({"stop_token_ids": [-1]}, "stop_token_ids has token id -1"),
    ({"repetition_penalty": 1e-30}, "within 1e-6 and 1e6"),
])
def test_rules_that_leave_nothing_to_say_harm_nobody(options: Any, reason: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        client.chat.completions.create(model="calf", messages=[{"role": "user", "content": "x"}], max_tokens=9,
                                       extra_body=options)
    assert client.completions.create(model="calf", prompt="x", max_tokens=1).usage


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_is_not_computed_for(stream: bool, real_url: str, real_service: Service) -> None:
    body = {"model": "calf", "prompt": "a b c", "max_tokens": 1500, "ignore_eos": True, "stream": stream}
    with httpx.Client(base_url=real_url, timeout=httpx.Timeout(10, read=0.3)) as client, suppress(httpx.ReadTimeout), \
            client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    until = time.monotonic() + 5
    while real_service.gauges()["running"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert real_service.gauges()["kv_cache_usage"] == 0


def test_pictures_that_are_bombs_or_broken_are_refused(client: openai.OpenAI) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    for data in (bomb, b"no picture"):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="calf", messages=[{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": _link(data)}}]}])


def test_metrics_of_the_engine(client: openai.OpenAI, real_url: str) -> None:
    client.completions.create(model="calf", prompt="Once", max_tokens=2)
    told = httpx.get(f"{real_url}/metrics").text
    families = text_string_to_metric_families(told)
    samples = {sample.name: sample for family in families for sample in family.samples}
    assert samples["vllm:iteration_tokens_total_sum"].value >= 3
    config = samples["vllm:cache_config_info"].labels
    assert (config["block_size"], config["enable_prefix_caching"]) == ("64", "True")
    assert int(config["num_gpu_blocks"]) * 64 <= int(config["kv_cache_size_tokens"])
