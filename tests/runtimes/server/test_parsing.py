"""Large bodies are parsed while others are answered."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from herdgraph.runtimes.server import parsing

LARGE = {"tokens": [400] * 50_000}


def test_others_are_answered_meanwhile(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    parses, answered = threading.Event(), threading.Event()

    def slow(body: bytes) -> Any:
        parses.set()
        assert answered.wait(10), "the other request was answered afterwards"
        return json.loads(body)

    monkeypatch.setattr(parsing, "parsed", slow)

    async def ask() -> tuple[int, int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://x") as http:
            large = asyncio.ensure_future(http.post("/detokenize", json=LARGE))
            while not parses.is_set():
                await asyncio.sleep(0.001)
            small = await http.post("/tokenize", json={"prompt": "Hi"})
            answered.set()
            return small.status_code, (await large).status_code

    assert asyncio.run(ask()) == (200, 200)


def test_threads_have_turns_while_numbers_are_parsed() -> None:
    body = json.dumps(list(range(300_000))).encode()
    turns, ended = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not ended.is_set():
            turns += 1
            time.sleep(0)

    other = threading.Thread(target=count)
    other.start()
    before, value, after = turns, parsing.parsed(body), turns
    ended.set()
    other.join()
    assert value == list(range(300_000))
    assert after - before > 3


@pytest.mark.parametrize("text", ["[1, -2, 3.5, 1e3]", '{"a": [true, null, "x"]}'])
def test_values_are_those_of_the_standard_parser(text: str) -> None:
    assert parsing.parsed(text.encode()) == json.loads(text)


def test_large_bodies_may_be_malformed(client: TestClient) -> None:
    for body in (b"[" + b"1," * 50_000, b'{"tokens": [' + b"1," * 50_000 + b"9" * 5000 + b"]}"):
        reply = client.post("/detokenize", content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert reply.json()["error"]["type"] == "invalid_request_error"
