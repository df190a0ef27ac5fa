"""Every reply that is not a success has an error object, whoever refused the request, and repeats little."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from herdgraph.runtimes.server.limits import extent_of
from herdgraph.runtimes.server.unknown_fields import is_misspelt
from support.fake_service import FakeService

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


def error_of(reply: Any, status: int, code: str | None) -> dict[str, Any]:
    """The error object of a reply."""
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert len(reply.content) < 2000
    return error


def test_addresses(client: TestClient) -> None:
    error_of(client.get("/nowhere"), 404, "not_found")
    assert "use POST" in error_of(client.get(PATH), 405, "method_not_allowed")["message"]
    for path in ("/chat/completions", "/v1/chat/completions/", "/v1/v1/chat/completions"):
        error = error_of(client.post(path, json=CHAT), 404, "not_found")
        assert error["message"].endswith("did you mean /v1/chat/completions?")
    error_of(client.delete("/v1/models"), 405, "method_not_allowed")
    for path in ("/v1/embeddings", "/rerank", "/v1/audio/speech", "/v1/responses/resp_1/cancel"):
        error_of(client.post(path, json={}), 404, "unsupported")
    error_of(client.post(PATH, json=CHAT | {"model": "gpt-9"}), 404, "model_not_found")


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"messages": 1}', b"{" * 9,
                                  b'{"messages": [' + b"1," * 5000 + b"1]}", b'{"n": ' + b"9" * 5000 + b"}",
                                  b'{"n": 1e999}', b'{"n": NaN}'])
def test_malformed_bodies(client: TestClient, body: bytes) -> None:
    error_of(client.post(PATH, content=body, headers={"content-type": "application/json"}), 400, None)


@pytest.mark.parametrize(("fields", "message"), [
    ({"tool_choice": 5}, "tool_choice: Input should be 'none', 'auto' or 'required' or Input should be a valid dict"),
    ({"stop": 5}, "stop: Input should be a valid string or Input should be a valid list"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a valid string or Input"),
])
def test_what_a_field_may_be_is_told_without_names_of_ours(
    fields: dict[str, Any], message: str, client: TestClient
) -> None:
    error = error_of(client.post(PATH, json=CHAT | fields), 400, None)
    assert error["message"].startswith(message)
    assert error["param"] == message.partition(":")[0]


def test_half_a_character(client: TestClient) -> None:
    for body in (rb'{"messages": [{"role": "user", "content": "\ud800"}]}',
                 rb'{"messages": [{"role": "user", "content": "x"}], "model": "\ud800"}',
                 rb'{"messages": [{"role": "user", "content": "x"}], "stop": "\ud800", "\ud800": 1}'):
        reply = client.post(PATH, content=body, headers={"content-type": "application/json"})
        assert reply.status_code in (200, 400, 404)


def test_type_of_the_body(client: TestClient) -> None:
    reply = client.post(PATH, content=json.dumps(CHAT), headers={"content-type": "text/plain"})
    error_of(reply, 415, "unsupported_media_type")


def test_large_body(client_of: Callable[..., TestClient], service: FakeService) -> None:
    client = client_of(body_bytes=1000)
    service.max_model_len = 10

    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    error_of(client.post(PATH, json=CHAT | {"user": "x" * 2000}), 413, "request_too_large")
    error_of(client.post(PATH, content=parts(), headers={"content-type": "application/json"}), 413,
             "request_too_large")


def test_deep_body(client: TestClient) -> None:
    body = b'{"messages": ' + b"[" * 100_000
    assert "64 deep" in error_of(client.post(PATH, content=body, headers={"content-type": "application/json"}), 400,
                                 None)["message"]


@pytest.mark.parametrize(("body", "depth"), [
    (b"", 0), (b"[]", 1), (b'{"a": [1, {"b": 2}], "c": []}', 3), (b'"[[[["', 0), (rb'["\"[[", "]"]', 1),
    (b'["[[[', 1), (b"]]]][[", 0),
])
def test_depth(body: bytes, depth: int) -> None:
    assert extent_of(body).depth == depth


def test_extent_of_a_large_body() -> None:
    body = b'{"url": "' + b"A" * (16 << 20) + b'", "x": ' + b'["a,\\"["],' * (1 << 20) + b"[]}"
    assert extent_of(body) == (2, (1 << 20) + 2, (1 << 20) + 1)


def test_a_body_of_too_many_values(client_of: Callable[..., TestClient], service: FakeService) -> None:
    client = client_of(json_values=10)
    service.max_model_len = 20
    assert client.post("/detokenize", json={"tokens": [400] * 30}).status_code == 200
    error_of(client.post("/detokenize", json={"tokens": [400] * 32}), 413, "request_too_large")


def test_a_body_of_too_many_lists(client_of: Callable[..., TestClient]) -> None:
    error = error_of(client_of(json_lists=10).post("/detokenize", json={"tokens": [[]] * 10}), 413, "request_too_large")
    assert "10 lists and objects" in error["message"]


def test_a_longer_context_takes_larger_bodies(client_of: Callable[..., TestClient], service: FakeService) -> None:
    client = client_of(body_bytes=100)
    assert client.post("/detokenize", json={"tokens": [400] * 1000}).status_code == 200
    service.max_model_len = 100
    error_of(client.post("/detokenize", json={"tokens": [400] * 1000}), 413, "request_too_large")


def test_of_many_wrong_values_the_first_is_told(client: TestClient) -> None:
    for path, body in (("/detokenize", {"tokens": ["a"] * 100}), (PATH, {"messages": [1] * 100})):
        assert "more" not in error_of(client.post(path, json=body), 400, None)["message"]


def test_other_encodings_hide_nothing(client: TestClient) -> None:
    body = ('{"a": "\u2200", "tokens": ' + "[" * 5000).encode("utf-16")
    reply = client.post("/detokenize", content=body, headers={"content-type": "application/json"})
    error_of(reply, 415, "unsupported_media_type")


def test_defects_are_told_as_such(client: TestClient, service: FakeService) -> None:
    def broken(request: Any, choice: int) -> str:
        raise RuntimeError("secret")

    service.script = broken
    assert "secret" not in error_of(client.post(PATH, json=CHAT), 500, "server_error")["message"]
    reply = client.post(PATH, json=CHAT | {"stream": True})
    assert reply.status_code == 200
    assert "secret" not in reply.text
    assert reply.text.endswith("data: [DONE]\n\n")
    assert json.loads(reply.text.split("\n\n")[-3].removeprefix("data: "))["error"]["code"] == "server_error"


def test_request_ids(client: TestClient) -> None:
    assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for given in ("a b", "x" * 129, ""):
        assert client.get("/health", headers={"x-request-id": given}).headers["x-request-id"] != given
    assert client.get("/nowhere").headers["x-request-id"]


def test_an_answer_that_the_end_of_the_server_cuts_short(
    client_of: Callable[..., TestClient], service: FakeService
) -> None:
    client = client_of()

    def script(*_: object) -> str:
        client.app.state.serving.drain()
        return "Hello"

    service.script, service.fails_after = script, 2
    reply = client.post(PATH, json=CHAT)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "10")
    assert reply.json()["error"]["message"] == "the server ended before the answer did"


def test_phases(client_of: Callable[..., TestClient]) -> None:
    client = client_of()
    serving = client.app.state.serving
    assert client.get("/ready").status_code == 200
    serving.phase, service = "loading", serving.service
    serving._service = None
    assert client.get("/health").status_code == 200
    error_of(client.get("/ready"), 503, "overloaded")
    assert client.post(PATH, json=CHAT).headers["retry-after"] == "5"
    assert client.get("/metrics").status_code == 200
    serving.open(service)
    serving.drain()
    reply = client.post(PATH, json=CHAT)
    error_of(reply, 503, "overloaded")
    assert reply.headers["connection"] == "close"
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200


def test_dead_engine(client: TestClient, service: FakeService) -> None:
    service.failure = "rank 1 died"
    assert "rank 1 died" in error_of(client.get("/health"), 503, "engine_dead")["message"]


def test_no_origin_is_allowed_by_default(client_of: Callable[..., TestClient]) -> None:
    asking = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client_of().options(PATH, headers=asking).headers
    allowed = client_of(cors_origins=("https://page.example",))
    assert allowed.options(PATH, headers=asking).headers["access-control-allow-origin"] == "https://page.example"
    evil = allowed.get("/health", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in evil.headers


@pytest.mark.parametrize(("name", "known", "misspelt"), [
    ("temprature", "temperature", True), ("temperatures", "temperature", True), ("tempreature", "temperature", True),
    ("max_tokans", "max_tokens", True), ("maxTokens", "max_tokens", True), ("max-tokens", "max_tokens", True),
    ("store", "stop", False), ("metadata", "model", False), ("k", "n", False), ("min_k", "min_p", True),
    ("seeed", "seed", True), ("modal", "model", True), ("stop_words", "stop", False),
])
def test_misspellings(name: str, known: str, misspelt: bool) -> None:
    assert is_misspelt(name, known) is misspelt
