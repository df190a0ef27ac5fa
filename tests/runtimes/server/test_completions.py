"""Text completions over HTTP: prompts in four forms, echo and log-probabilities as lm-eval reads them, streams."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from support.fake_service import FakeService


def ask(client: TestClient, **fields: Any) -> Any:
    """The reply to a completion, which has to be a success."""
    reply = client.post("/v1/completions", json=fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(client: TestClient, **fields: Any) -> list[Any]:
    """The chunks of a stream."""
    reply = client.post("/v1/completions", json={"stream": True} | fields)
    assert reply.status_code == 200, reply.text
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_reply(client: TestClient, service: FakeService) -> None:
    reply = ask(client, prompt="Say")
    assert reply["object"] == "text_completion"
    assert reply["choices"] == [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop", "stop_reason": None}]
    assert service.requests[0].stop.max_new_tokens == 16
    assert service.requests[0].prompt.token_ids == service.engine.processor.tokenizer.encode("Say")


def test_length_and_stop(client: TestClient) -> None:
    assert ask(client, prompt="x", max_tokens=2)["choices"][0]["finish_reason"] == "length"
    assert ask(client, prompt="x", stop="ll")["choices"][0]["stop_reason"] == "ll"


@pytest.mark.parametrize(("prompt", "count"), [("ab", 1), (["ab", "cd", "e"], 3), ([5, 6], 1), ([[5, 6], [7]], 2)])
def test_forms_of_prompts(client: TestClient, service: FakeService, prompt: Any, count: int) -> None:
    reply = ask(client, prompt=prompt, n=2)
    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * count))
    assert [choice["text"] for choice in reply["choices"]] == ["Hello", "Good day"] * count
    assert len(service.requests) == count
    assert reply["usage"]["prompt_tokens"] == sum(len(one.prompt.token_ids) for one in service.requests)
    if prompt == [[5, 6], [7]]:
        assert [one.prompt.token_ids for one in service.requests] == prompt


@pytest.mark.parametrize("most", [0, 1])
def test_log_likelihood_as_lm_eval_reads_it(client: TestClient, service: FakeService, most: int) -> None:
    """Its request and its reading of the reply: log-probabilities of the prompt's last tokens."""
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    reply = ask(client, model="calf", prompt=prompts, temperature=0, max_tokens=most, logprobs=1, seed=1234, echo=True)
    for prompt, choice in zip(prompts, reply["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(prompt) + most
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == [-0.5] * (len(prompt) - 1 + most)
        assert all(max(top.values()) == -0.5 for top in logprobs["top_logprobs"][1:])
        decode = service.engine.processor.tokenizer.decode
        assert choice["text"] == decode(prompt) + "H" * most
        assert logprobs["tokens"][: len(prompt)] == [decode([token]) for token in prompt]
        assert logprobs["text_offset"][: len(prompt)] == list(range(len(prompt)))
        assert choice["finish_reason"] == "length"
    assert [one.prompt_logprobs for one in service.requests] == [1, 1]


def test_stream_with_echo(client: TestClient) -> None:
    chunks = stream(client, prompt=["ab", "cd"], echo=True, logprobs=0, stream_options={"include_usage": True})
    *chunks, usage = chunks
    texts, offsets = ["", ""], [[], []]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        if choice["logprobs"]:
            offsets[choice["index"]] += choice["logprobs"]["text_offset"]
    assert texts == ["abHello", "cdHello"]
    # The stop token has one, too.
    assert all(len(found) == 2 + 6 and found == sorted(found) for found in offsets)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12


def test_silent_stream(client: TestClient) -> None:
    chunks = stream(client, prompt="ab", echo=True, max_tokens=0)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "ab"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(("fields", "part"), [
    ({"prompt": ""}, "empty"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [600]}, "token id 600, the vocabulary has 512"),
    ({"prompt": [-1]}, "token id -1"),
    ({"prompt": [500]}, "image tokens"),
    ({"prompt": "<|image|>"}, "image placeholders"),
    ({"prompt": "x", "max_tokens": 0}, "only echo"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "max_tokens": 5000}, "context is 4096"),
    ({"prompt": "x", "logprobs": 101}, "logprobs"),
    ({"prompt": "x", "ech": True}, "ech is no field"),
    ({"prompt": ["x"] * 257}, "prompt"),
    ({}, "prompt"),
])
def test_wrong_requests(client: TestClient, fields: dict[str, Any], part: str) -> None:
    reply = client.post("/v1/completions", json=fields)
    assert reply.status_code == 400
    assert part in reply.json()["error"]["message"]


def test_all_or_none(client: TestClient, service: FakeService) -> None:
    """When one prompt of several is refused, those that were queued before it are taken back."""
    reply = client.post("/v1/completions", json={"prompt": [[5], [5] * 4050]})
    assert reply.status_code == 400
    assert [answer.cancelled for answer in service.answers] == [True]


def test_of_a_long_prompt_the_end_is_read(client: TestClient, service: FakeService) -> None:
    ids = list(range(10, 30))
    for prompt in (ids, client.post("/detokenize", json={"tokens": ids}).json()["prompt"]):
        ask(client, prompt=prompt, truncate_prompt_tokens=3)
        assert service.requests[-1].prompt.token_ids == ids[-3:]
    ask(client, prompt=[10] * 5000, truncate_prompt_tokens=-1, max_tokens=200)
    assert len(service.requests[-1].prompt.token_ids) == 4096 - 200
    assert client.post("/v1/completions", json={"prompt": "x", "truncate_prompt_tokens": 0}).status_code == 400
