"""Keys, metrics, the request log, and what happens to those who go or do not read."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from herdgraph.errors import HerdError
from herdgraph.runtimes.server import keys as keys_module
from herdgraph.runtimes.server.app import create_app
from herdgraph.runtimes.server.keys import read_keys
from herdgraph.runtimes.server.options import ServerOptions
from support.fake_service import FakeService

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# -- keys ------------------------------------------------------------------------------------------------------------


def test_keys(client_of: Callable[..., TestClient], keys_file: Path, service: FakeService) -> None:
    client = client_of(api_keys=keys_file)
    for headers in ({}, bearer("sk-three"), {"authorization": "Basic sk-one"}, bearer("")):
        reply = client.post(PATH, json=CHAT, headers=headers)
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    for headers in (bearer("sk-one"), {"x-api-key": "sk-two"}):
        assert client.post(PATH, json=CHAT, headers=headers).status_code == 200
    assert len({request.salt for request in service.requests}) == 2
    assert client.get("/v1/models").status_code == 401
    for path in ("/", "/health", "/ready", "/metrics"):
        assert client.get(path).status_code == 200
    assert client.post("/v1/messages", json={}).json()["error"]["type"] == "authentication_error"


def test_keys_are_read_again(
    client_of: Callable[..., TestClient], keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "_SECONDS_BETWEEN_LOOKS", 0.0)
    client = client_of(api_keys=keys_file)
    keys_file.write_text(f"sha256:{hashlib.sha256(b'sk-three').hexdigest()}  # carol\nsk-two\n")
    os.utime(keys_file, ns=(1, 1))
    statuses = [client.get("/v1/models", headers=bearer(key)).status_code for key in ("sk-one", "sk-two", "sk-three")]
    assert statuses == [401, 200, 200]
    keys_file.write_text("sha256:12\n")
    assert client.get("/v1/models", headers=bearer("sk-two")).status_code == 200


def test_files_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("\n# nobody\nsk-1\nsk-2 bob\nsha256:" + "AB" * 32 + " # eve\n")
    assert [key.name for key in read_keys(path)] == [hashlib.sha256(b"sk-1").hexdigest()[:8], "bob", "eve"]
    for text, problem in (("# none", "no API key"), ("sha256:xyz", "line 1 has a hash")):
        path.write_text(text)
        with pytest.raises(HerdError, match=problem):
            read_keys(path)


def test_key_of_metrics(client_of: Callable[..., TestClient], keys_file: Path) -> None:
    keys_file.write_text("sk-one\nsk-m metrics\n")
    client = client_of(api_keys=keys_file)
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers=bearer("sk-m")).status_code == 200
    assert client.get("/v1/models", headers=bearer("sk-m")).status_code == 401


# -- metrics and log -------------------------------------------------------------------------------------------------


def test_metrics_have_the_names_of_vllm(client: TestClient, service: FakeService) -> None:
    client.post(PATH, json=CHAT | {"n": 2})
    service.full = True
    client.post(PATH, json=CHAT)
    client.get("/no/such/page")
    service.on_step(9)
    text = client.get("/metrics").text
    label = 'engine="0",model_name="calf"'
    for line in (
        f"vllm:num_requests_running{{{label}}} 0.0", f"vllm:num_requests_waiting{{{label}}} 0.0",
        f'vllm:num_requests_waiting_by_reason{{{label},reason="capacity"}} 2.0',
        f'vllm:num_requests_waiting_by_reason{{{label},reason="deferred"}} 1.0',
        'vllm:cache_config_info{engine="0",block_size="64",num_gpu_blocks="100"} 1.0',
        f'vllm:iteration_tokens_total_bucket{{{label},le="8.0"}} 0.0',
        f'vllm:iteration_tokens_total_bucket{{{label},le="16.0"}} 1.0',
        f"vllm:iteration_tokens_total_sum{{{label}}} 9.0",
        f"vllm:kv_cache_usage_perc{{{label}}} 0.25", f"vllm:prefix_cache_queries_total{{{label}}} 100.0",
        f"vllm:prefix_cache_hits_total{{{label}}} 40.0", f"vllm:num_preemptions_total{{{label}}} 1.0",
        f"vllm:spec_decode_num_accepted_tokens_total{{{label}}} 5.0", f"vllm:generation_tokens_total{{{label}}} 15.0",
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label},position="1"}} 2.0',
        f"vllm:mm_cache_queries_total{{{label}}} 6.0", f"vllm:mm_cache_hits_total{{{label}}} 4.0",
        f'vllm:prompt_tokens_by_source_total{{{label},source="local_cache_hit"}} 1.0',
        f"vllm:request_max_num_generation_tokens_sum{{{label}}} 9.0",
        f"vllm:request_num_preemptions_sum{{{label}}} 0.0",
        f"vllm:time_to_first_token_seconds_count{{{label}}} 1.0",
        f"vllm:inter_token_latency_seconds_count{{{label}}} 13.0",
        f"vllm:e2e_request_latency_seconds_count{{{label}}} 1.0",
        f"vllm:request_queue_time_seconds_count{{{label}}} 1.0", f"vllm:request_params_n_sum{{{label}}} 2.0",
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="calf"} 2.0',
        'vllm:admission_rejections_total{engine="0",model_name="calf",reason="overloaded"} 1.0',
        'http_requests_total{handler="/v1/chat/completions",method="POST",status="200"} 1.0',
        'http_requests_total{handler="/v1/chat/completions",method="POST",status="503"} 1.0',
        'http_requests_total{handler="none",method="GET",status="404"} 1.0',
    ):
        assert _sorted(line) in {_sorted(found) for found in text.splitlines()}, line


def _sorted(line: str) -> str:
    """A line of metrics with its labels in order."""
    name, brace, rest = line.partition("{")
    labels, _, value = rest.partition("}")
    return name + brace + ",".join(sorted(labels.split(","))) + value


def test_load_is_told_of_the_own_key_only(
    client_of: Callable[..., TestClient], keys_file: Path, service: FakeService
) -> None:
    """While an answer is generated; afterwards there is none."""
    client, seen = client_of(api_keys=keys_file), list[Any]()

    def script(request: Any, choice: int) -> str:
        seen.extend(client.get("/load", headers=bearer(key)).json() for key in ("sk-one", "sk-two"))
        return "Hello"

    service.script = script
    client.post(PATH, json=CHAT | {"max_tokens": 9, "priority": 2}, headers=bearer("sk-one") | {"x-request-id": "r-1"})
    own, others = seen
    assert own["server_load"] == others["server_load"] == 1
    assert others["requests"] == []
    run = own["requests"][0]
    assert (run["request_id"], run["max_tokens"], run["priority"], run["waiting"]) == ("r-1", 9, 2, False)
    assert client.get("/load", headers=bearer("sk-one")).json() == {"server_load": 0, "requests": []}
    assert client.get("/load").status_code == 401


def test_log_has_numbers_and_no_texts(client_of: Callable[..., TestClient], keys_file: Path) -> None:
    lines = io.StringIO()
    client = client_of(request_log=lines, api_keys=keys_file)
    asked = {"messages": [{"role": "user", "content": "a secret"}]}
    client.post(PATH, json=asked, headers=bearer("sk-one") | {"x-request-id": "r-1"})
    line = json.loads(lines.getvalue())
    assert line["request_id"] == "r-1"
    assert (line["key"], line["status"], line["path"]) == ("alice", 200, PATH)
    assert line["completion_tokens"] == 6
    assert line["finish"] == {"stop": 1}
    assert line["ttft"] > 0
    assert line["tpot"] >= 0
    assert "secret" not in lines.getvalue()
    assert "Hello" not in lines.getvalue()


# -- clients that go, and those that do not read ---------------------------------------------------------------------


async def _until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def _talk(
    app: Any, body: dict[str, Any], *, leave: Callable[[list[dict[str, Any]]], object], key: str = ""
) -> list[dict[str, Any]]:
    """One request by ASGI; the client leaves when what it was told so far says so."""
    content = json.dumps(body).encode()
    told: list[dict[str, Any]] = []
    asked = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive() -> dict[str, Any]:
        if (message := next(asked, None)) is not None:
            return message
        await _until(lambda: leave(told))
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        told.append(message)

    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {key}".encode())]
    scope = {"type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "query_string": b"",
             "headers": headers, "scheme": "http", "server": ("x", 80), "client": ("y", 1), "http_version": "1.1",
             "asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": ""}
    await asyncio.wait_for(app(scope, receive, send), 30)
    return told


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("queued", [True, False])
def test_a_client_that_goes_ends_its_request(
    client_of: Callable[..., TestClient], service: FakeService, streamed: bool, queued: bool
) -> None:
    service.stuck, service.delay = queued, 0.01
    service.script = lambda request, choice: "x" * 1000
    lines = io.StringIO()
    app = client_of(request_log=lines).app
    asked = CHAT | {"stream": streamed}
    told = asyncio.run(_talk(app, asked, leave=lambda told: told if streamed else service.answers))
    assert [answer.cancelled for answer in service.answers] == [True]
    assert bool(told) is streamed
    assert json.loads(lines.getvalue())["finish"] == {"abort": 1}
    assert json.loads(lines.getvalue())["status"] == (200 if streamed else 499)


def test_a_silent_stream_says_that_it_lives(client_of: Callable[..., TestClient], service: FakeService) -> None:
    service.delay = 0.15
    service.script = lambda request, choice: "x"
    text = client_of(keep_alive_seconds=0.05).post(PATH, json=CHAT | {"stream": True}).text
    assert text.count(": keep-alive\n\n") >= 2
    assert text.endswith("data: [DONE]\n\n")


def test_headers_of_a_stream(client: TestClient) -> None:
    headers = client.post(PATH, json=CHAT | {"stream": True}).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")


def test_who_does_not_read_is_cut_off(service: FakeService) -> None:
    app = create_app(service, ServerOptions(names=("calf",), write_seconds=0.05))
    service.script = lambda request, choice: "x" * 100

    async def talk() -> None:
        sent = 0

        async def send(message: dict[str, Any]) -> None:
            nonlocal sent
            sent += 1
            if sent > 5:
                await asyncio.Event().wait()

        content = json.dumps(CHAT | {"stream": True}).encode()
        asked = iter([{"type": "http.request", "body": content, "more_body": False}])

        async def receive() -> dict[str, Any]:
            if (message := next(asked, None)) is not None:
                return message
            await asyncio.Event().wait()
            return {}

        scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "scheme": "http",
                 "headers": [(b"content-type", b"application/json")], "server": ("x", 80), "client": ("y", 1),
                 "http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": ""}
        await asyncio.wait_for(app(scope, receive, send), 5)

    asyncio.run(talk())
    assert [answer.cancelled for answer in service.answers] == [True]


def test_a_slow_body_is_refused(client_of: Callable[..., TestClient]) -> None:
    app = client_of(body_seconds=0.05).app

    async def body() -> Any:
        yield b'{"messages": '
        await asyncio.sleep(1)
        yield b"[]}"

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post(PATH, content=body(), headers={"content-type": "application/json"})

    reply = asyncio.run(ask())
    assert reply.status_code == 408
    assert reply.json()["error"]["code"] == "request_timeout"


def test_requests_of_a_key_are_limited(
    client_of: Callable[..., TestClient], service: FakeService, keys_file: Path
) -> None:
    service.stuck = True
    app = client_of(api_keys=keys_file, key_requests=2).app

    async def ask() -> list[list[dict[str, Any]]]:
        ended = asyncio.Event()
        busy = [asyncio.ensure_future(_talk(app, CHAT, leave=lambda told: ended.is_set(), key="sk-one"))
                for _ in range(2)]
        await _until(lambda: len(service.answers) == 2)
        third = await _talk(app, CHAT, leave=lambda told: told, key="sk-one")
        other = await _talk(app, CHAT, leave=lambda told: len(service.answers) == 3, key="sk-two")
        ended.set()
        await asyncio.gather(*busy)
        return [third, other, await _talk(app, CHAT, leave=lambda told: len(service.answers) == 4, key="sk-one")]

    third, other, later = asyncio.run(ask())
    assert third[0]["status"] == 429
    assert (b"retry-after", b"1") in third[0]["headers"]
    assert json.loads(third[1]["body"])["error"]["code"] == "rate_limit_exceeded"
    assert other == later == []
    assert len(service.answers) == 4
