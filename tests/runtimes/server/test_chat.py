"""Chat completions over HTTP: the reply, the stream to the byte, parameters, tools and formats."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from herdgraph.model.processing import ChatTemplate
from support import clips, herds
from support.fake_service import FakeService

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def ask(client: TestClient, **fields: Any) -> Any:
    """The reply to a chat, which has to be a success."""
    reply = client.post("/v1/chat/completions", json=CHAT | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(client: TestClient, **fields: Any) -> list[Any]:
    """The chunks of a stream."""
    reply = client.post("/v1/chat/completions", json=CHAT | {"stream": True} | fields)
    assert reply.status_code == 200, reply.text
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def refused(client: TestClient, **fields: Any) -> dict[str, Any]:
    """The error object of a chat that is wrong."""
    reply = client.post("/v1/chat/completions", json=CHAT | fields)
    assert reply.status_code == 400, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


def test_reply(client: TestClient, service: FakeService) -> None:
    reply = ask(client, model="calf")
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "calf"
    assert reply["choices"] == [{
        "index": 0, "message": {"role": "assistant", "content": "Hello", "refusal": None}, "logprobs": None,
        "finish_reason": "stop", "stop_reason": None}]
    prompt = len(service.requests[0].prompt.token_ids)
    assert reply["usage"]["prompt_tokens"] == prompt
    assert reply["usage"]["total_tokens"] == prompt + 6
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_stream_is_what_clients_expect(client: TestClient) -> None:
    chunks = stream(client, stream_options={"include_usage": True})
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    first, *middle, ending, usage = chunks
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                                 "finish_reason": None}]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "Hello"
    assert all(chunk["choices"][0]["finish_reason"] is None and chunk["usage"] is None for chunk in middle)
    assert ending["choices"][0]["delta"] == {}
    assert ending["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6


def test_stream_without_usage_has_none(client: TestClient) -> None:
    assert all("usage" not in chunk for chunk in stream(client))


def test_stream_with_usage_all_along(client: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk["usage"]["completion_tokens"] for chunk in stream(client, stream_options=options)]
    assert counts == [0, 1, 2, 3, 4, 5, 6, 6]


def test_several_answers(client: TestClient) -> None:
    texts = ["Hello", "Good day", "Hi"]
    assert [choice["message"]["content"] for choice in ask(client, n=3)["choices"]] == texts
    streamed = ["", "", ""]
    for chunk in stream(client, n=3):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert streamed == texts


def test_logprobs(client: TestClient) -> None:
    logprobs = ask(client, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    first = logprobs["content"][0]
    assert (first["token"], first["bytes"], len(first["top_logprobs"])) == ("H", [72], 2)
    assert len(logprobs["content"]) == 6
    streamed = [entry for chunk in stream(client, logprobs=True)
                for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in streamed] == [*"Hello", "<|eot|>"]
    assert ask(client, logprobs=True, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]["content"][0][
        "token"].startswith("token_id:")


def test_token_ids(client: TestClient, service: FakeService) -> None:
    reply = ask(client, return_token_ids=True)
    assert reply["prompt_token_ids"] == service.requests[0].prompt.token_ids
    assert len(reply["choices"][0]["token_ids"]) == 6
    first, *chunks = stream(client, return_token_ids=True)
    assert first["prompt_token_ids"] == service.requests[0].prompt.token_ids
    streamed = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert streamed == reply["choices"][0]["token_ids"]


def test_prompt_logprobs(client: TestClient, service: FakeService) -> None:
    told = ask(client, prompt_logprobs=1)["prompt_logprobs"]
    assert told[0] is None
    assert len(told) == len(service.requests[0].prompt.token_ids)
    assert refused(client, prompt_logprobs=1, stream=True)["message"].startswith("prompt_logprobs are not streamed")


def test_parameters_reach_the_service(client: TestClient, service: FakeService) -> None:
    ask(client, temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, repetition_penalty=1.1, presence_penalty=1,
        frequency_penalty=-1, logit_bias={"5": 3}, allowed_token_ids=[7, 5], bad_words=["no"], seed=-1, stop="x",
        stop_token_ids=[9], include_stop_str_in_output=True, ignore_eos=True, min_tokens=2, max_tokens=7, priority=3)
    request = service.requests[0]
    sampling, stop = request.sampling, request.stop
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, 1, -1)
    assert sampling.logit_bias == {5: 3}
    assert sampling.allowed_token_ids == (5, 7)
    assert len(sampling.bad_words) == 2
    assert sampling.seed == (1 << 64) - 1
    assert stop.max_new_tokens == 7
    assert (stop.ids, stop.strings, stop.min_tokens, stop.keeps_string) == ({9}, ("x",), 2, True)
    assert request.priority == 3
    assert request.never == (500,)


def test_defaults(client: TestClient, service: FakeService) -> None:
    ask(client)
    request = service.requests[0]
    assert request.sampling.temperature == 1.0
    assert request.stop.max_new_tokens == 4096 - len(request.prompt.token_ids)
    assert 508 in request.stop.ids
    assert request.salt == b""
    ask(client, cache_salt="mine")
    assert len(service.requests[1].salt) == 32


@pytest.mark.parametrize(("fields", "param", "part"), [
    ({"temperature": -1}, "temperature", "within 1e-6 and 1e6"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"temperature": True}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
    ({"logit_bias": {"600": 1}}, "logit_bias", "vocabulary has 512"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "maps token ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "is empty"),
    ({"stop": [""]}, "stop", "is empty"),
    ({"stop": ["x"] * 17}, "stop.list[constrained-str]", ""),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 65}, "n", "less than or equal to 64"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "at most 3"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "system"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "has no content"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}]}, None, "image_url"),
    ({"add_generation_prompt": False}, "add_generation_prompt", "continue_final_message"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
    ({"structured_outputs": {"regex": "("}}, "response_format", "not closed"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "more than one"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs", "takes json"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs", "no JSON"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tools": [TOOL, TOOL]}, "tools", "the same name"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "not among"),
    ({"tools": [TOOL], "structured_outputs": {"regex": "("}}, "response_format", "not closed"),
])
def test_wrong_values_are_told(client: TestClient, fields: dict[str, Any], param: str | None, part: str) -> None:
    error = refused(client, **fields)
    assert part in error["message"]
    if param and "[" not in param:
        assert error["param"] == param


def test_context_is_told_with_both_numbers(client: TestClient) -> None:
    error = refused(client, max_tokens=4090)
    assert error["code"] == "context_length_exceeded"
    assert "context is 4096 tokens" in error["message"]
    assert "4090 of the answer" in error["message"]
    for size in (4090, 100_000):
        assert refused(client, messages=[{"role": "user", "content": "x" * size}])["code"] == "context_length_exceeded"


def test_continued_message(client: TestClient, service: FakeService) -> None:
    ask(client, messages=[*CHAT["messages"], {"role": "assistant", "content": "Well"}], continue_final_message=True)
    ask(client)
    continued, begun = (request.prompt.token_ids for request in service.requests)
    assert continued == [*begun, *service.engine.processor.tokenizer.encode("Well")]
    assert "last message" in refused(client, continue_final_message=True)["message"]


def test_pictures(client: TestClient, service: FakeService) -> None:
    picture = {"type": "image_url", "image_url": {"url": _picture(), "detail": "high"}}
    ask(client, messages=[{"role": "user", "content": [picture, {"type": "text", "text": "?"}]}])
    assert service.requests[0].prompt.pixel_values is not None
    error = refused(client, messages=[{"role": "user", "content": [picture] * 9}])
    assert "9 pictures, at most 8" in error["message"]
    away = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
    assert "--image-hosts" in refused(client, messages=[{"role": "user", "content": [away]}])["message"]


def test_videos(client: TestClient, client_of: Callable[..., TestClient], service: FakeService) -> None:
    clip = base64.b64encode(clips.animation(clips.frames(), kind="gif")).decode()
    shown = {"type": "video_url", "video_url": {"url": f"data:image/gif;base64,{clip}", "max_frames": 2}}
    ask(client, messages=[{"role": "user", "content": [shown, {"type": "text", "text": "?"}]}])
    prompt = service.requests[0].prompt
    assert prompt.pixel_values is not None
    assert len(prompt.pixel_values) == 2
    assert "Time: 1.0s" in service.engine.processor.tokenizer.decode(prompt.token_ids)
    few = client_of(frames=3)
    assert "2 videos may have 4 frames, at most 3" in refused(few, messages=_user(shown, shown))["message"]
    cut = shown | {"video_url": {"url": shown["video_url"]["url"][:-100]}}
    assert "the video data is a broken" in refused(client, messages=_user(cut))["message"]
    away = {"type": "video_url", "video_url": {"url": "http://169.254.169.254/latest"}}
    assert "--image-hosts" in refused(client, messages=_user(away))["message"]


def _user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def _picture() -> str:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (28, 28), "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_tools(client: TestClient, service: FakeService) -> None:
    service.script = lambda request, choice: 'Look: <weather {"city": "Ulm"}><weather {"city": "Bonn"}>'
    choice = ask(client, tools=[TOOL])["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Look: "
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == [
        '{"city": "Ulm"}', '{"city": "Bonn"}']
    assert choice["message"]["tool_calls"][1]["id"] == "call_1"
    assert service.requests[0].constraint[0] == "tools"
    assert service.requests[0].constraint[1][1] == "auto"
    assert service.requests[0].constraint[2] == {"parallel": True, "formats": ("pythonic", "json")}


def test_tools_are_streamed_as_the_specification_says(client: TestClient, service: FakeService) -> None:
    service.script = lambda request, choice: 'A<weather {"city": "Ulm"}>'
    deltas = [chunk["choices"][0]["delta"] for chunk in stream(client, tools=[TOOL])]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0] == {"index": 0, "id": "call_0", "type": "function",
                        "function": {"name": "weather", "arguments": ""}}
    assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in calls[1:])
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Ulm"}'


def test_a_format_beside_tools(client: TestClient, service: FakeService) -> None:
    service.script = lambda request, choice: '<weather {"city": "Ulm"}>' if request.sampling.seed else '{"a": 1}'
    asked = {"tools": [TOOL], "parallel_tool_calls": False, "response_format": {"type": "json_object"}}
    assert ask(client, seed=0, **asked)["choices"][0]["message"]["content"] == '{"a": 1}'
    assert ask(client, seed=1, **asked)["choices"][0]["finish_reason"] == "tool_calls"
    kind, (form, tools), options = service.requests[0].constraint
    assert (kind, form, options) == ("beside_calls", ("json_object", (), {}), {"parallel": False})
    assert tools[0]["function"]["name"] == "weather"


def test_choice_of_tools(client: TestClient, service: FakeService) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    ask(client, tools=[TOOL], tool_choice=named, parallel_tool_calls=False, response_format={"type": "json_object"})
    assert service.requests[0].constraint[1][1] == "weather"
    assert service.requests[0].constraint[2]["parallel"] is False
    ask(client, tools=[TOOL], tool_choice="none")
    assert service.requests[1].constraint is None
    assert service.requests[1].prompt.token_ids == service_prompt(client, service)


def service_prompt(client: TestClient, service: FakeService) -> list[int]:
    """Tokens of the chat without tools."""
    ask(client)
    return service.requests[-1].prompt.token_ids


def test_results_of_tools(client: TestClient, service: FakeService) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    ask(client, max_tokens=1, messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert "f" in service.engine.processor.tokenizer.decode(service.requests[0].prompt.token_ids)


@pytest.mark.parametrize(("fields", "spec"), [
    ({"response_format": {"type": "json_object"}}, ("json_object", (), {})),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}}},
     ("json_schema", ({"type": "null"},), {})),
    ({"response_format": {"type": "text"}}, None),
    ({"structured_outputs": {"json": '{"type": "null"}'}}, ("json_schema", ({"type": "null"},), {})),
    ({"structured_outputs": {"regex": "a+"}}, ("regex", ("a+",), {})),
    ({"structured_outputs": {"choice": ["a", "b"]}}, ("choice", (["a", "b"],), {})),
    ({"structured_outputs": {"grammar": "start: A"}}, ("lark", ("start: A",), {})),
])
def test_formats(client: TestClient, service: FakeService, fields: dict[str, Any], spec: Any) -> None:
    ask(client, **fields)
    assert service.requests[0].constraint == spec


def test_failure_in_the_middle(client: TestClient, service: FakeService) -> None:
    """A stream tells it in an event and ends as streams end; a reply has the status."""
    service.fails_after = 2
    chunks = stream(client)
    assert chunks[-1] == {"error": {"message": "the weights are on fire", "type": "server_error", "param": None,
                                    "code": "server_error"}}
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 500
    assert all(answer.cancelled for answer in service.answers)


def test_full_queue(client: TestClient, service: FakeService) -> None:
    service.full = True
    for streamed in (True, False):
        reply = client.post("/v1/chat/completions", json=CHAT | {"stream": streamed})
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "7"
        assert reply.json()["error"]["code"] == "overloaded"


def test_control_tokens_are_shown_where_they_are_asked_for(client: TestClient, service: FakeService) -> None:
    ask(client, skip_special_tokens=False)
    ask(client, skip_special_tokens=True)
    assert [request.shows_special for request in service.requests] == [True, False]
    both = {"tools": [TOOL], "response_format": {"type": "json_object"}}
    assert refused(client, skip_special_tokens=False, **both)["param"] == "skip_special_tokens"


def test_unknown_fields(client_of: Callable[..., TestClient], client: TestClient) -> None:
    assert refused(client, max_token=3)["message"].endswith("did you mean max_tokens?")
    assert refused(client, maxTokens=3)["param"] == "maxTokens"
    assert "structured_outputs" in refused(client, guided_json={})["message"]
    assert "tools" in refused(client, functions=[])["message"]
    assert refused(client, best_of=2)["code"] == "unsupported_parameter"
    assert refused(client, use_beam_search=True)["param"] == "use_beam_search"
    assert "offer a tool" in refused(client, web_search_options={})["message"]
    assert refused(client, chat_template="{{ messages }}")["param"] == "chat_template"
    ask(client, best_of=2, n=2)
    ask(client, use_beam_search=False, skip_special_tokens=True, user=None)
    reply = client.post("/v1/chat/completions", json=CHAT | {"user": "me", "store": True, "x\r\ny": 1})
    assert reply.headers["x-herdgraph-ignored"] == "user, store"


# -- how the prompt is made ------------------------------------------------------------------------------------------


def test_variables_of_the_template(
    client: TestClient, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate("{{ mood | default('plain') }}: {{ messages[0].content }}", {}, herds.SPECIAL)
    monkeypatch.setitem(service.engine.processor.__dict__, "_template", template)
    asked = {"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"mood": "<|eot|>", "other": 1}}
    assert client.post("/v1/chat/completions/render", json=asked).json()["prompt"] == "<|eot|>: Hi"
    ids = client.post("/tokenize", json=asked).json()["tokens"]
    assert herds.SPECIAL["<|eot|>"] not in ids
    ask(client, chat_template_kwargs={"mood": "<|eot|>"})
    assert service.requests[-1].prompt.token_ids[:5] == ids[:5]
    for name in ("messages", "tools", "add_generation_prompt", "chat_template", "range"):
        assert name in refused(client, chat_template_kwargs={name: []})["message"]


def test_of_a_long_prompt_the_end_is_read(client: TestClient, service: FakeService) -> None:
    ask(client)
    whole = service.requests[-1].prompt.token_ids
    ask(client, truncate_prompt_tokens=5)
    assert service.requests[-1].prompt.token_ids == whole[-5:]
    ask(client, truncate_prompt_tokens=4000)
    assert service.requests[-1].prompt.token_ids == whole
    ask(client, messages=[{"role": "user", "content": "x" * 8000}], truncate_prompt_tokens=-1, max_tokens=1000)
    assert len(service.requests[-1].prompt.token_ids) == 4096 - 1000
    too_many = refused(client, truncate_prompt_tokens=4000, max_tokens=1000)
    assert too_many["param"] == "truncate_prompt_tokens"
    assert "3096 fit" in too_many["message"]
    assert refused(client, truncate_prompt_tokens=-2)["param"] == "truncate_prompt_tokens"


def test_pictures_are_not_cut(client: TestClient) -> None:
    content = [{"type": "image_url", "image_url": {"url": _picture()}}]
    error = refused(client, messages=[{"role": "user", "content": content}], truncate_prompt_tokens=3)
    assert "pictures" in error["message"]
