"""Answers of servers: what is asked of them, what is shown of it, and every way in which they fail in one line."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from herdgraph.errors import StoppedError
from herdgraph.runtimes.client import Address, RemoteServer, connection
from support import clips
from support.command_line import run
from support.scripted_server import ScriptedServer, begun, chat_events, events

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
HI = {"role": "user", "content": "Hi"}


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HERDGRAPH_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        yield running


# -- what is asked ---------------------------------------------------------------------------------------------------


def test_options_become_the_fields_of_a_request(server: ScriptedServer) -> None:
    """What is not given is not sent: the server's own defaults hold."""
    given = ["-n", 7, "--temperature", 0.5, "--top-p", 0.9, "--top-k", 3, "--min-p", 0.1, "--repetition-penalty", 1.2,
             "--seed", 1, "--stop", "x", "--stop-id", 5]
    assert run("generate", "--url", server.url, "Hi").stdout == "Hello\n"
    run("generate", "--url", f"{server.url}/v1/", "-p", "Hi", *given, "--system", "Be brief.", "--model", "cow")
    run("chat", "--url", server.url, "--raw", stdin="Hi\n")
    always = {"stream": True, "stream_options": {"include_usage": True}}
    assert [asked.body for asked in server.asked] == [
        {"model": "calf", "messages": [HI], "max_tokens": 256, **always},
        {"model": "cow", "messages": [{"role": "system", "content": "Be brief."}, HI], "max_tokens": 7,
         "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 1,
         "stop": ["x"], "stop_token_ids": [5], **always},
        {"model": "calf", "prompt": "Hi", "max_tokens": 256, **always}]
    assert [asked.path for asked in server.asked] == ["/v1/chat/completions"] * 2 + ["/v1/completions"]
    assert "Authorization" not in server.asked[0].headers


def test_a_server_that_calls_a_field_otherwise(server: ScriptedServer) -> None:
    server.card = {"id": "calf", "owned_by": "llamacpp"}
    run("generate", "--url", server.url, "Hi", "--repetition-penalty", 1.2)
    assert server.asked[0].body["repeat_penalty"] == 1.2
    assert "repetition_penalty" not in server.asked[0].body


@pytest.mark.parametrize("card", [{"max_model_len": 2048}, {"meta": {"n_ctx": 2048, "n_ctx_train": 1 << 20}}])
def test_the_context_by_either_name(server: ScriptedServer, card: dict[str, Any]) -> None:
    server.card = {"id": "calf", **card}
    assert RemoteServer(Address.of(server.url)).context == 2048


def test_a_model_that_is_named_need_not_be_listed(server: ScriptedServer) -> None:
    server.card = {}
    assert "refuses with status 404" in run("generate", "--url", server.url, "Hi").stderr
    assert run("generate", "--url", server.url, "Hi", "--model", "cow").stdout == "Hello\n"


def test_pictures_go_as_they_are_or_as_png(server: ScriptedServer, tmp_path: Path) -> None:
    for name in ("cow.jpeg", "cow.bmp"):
        Image.new("RGB", (8, 8), "green").save(tmp_path / name)
    run("generate", "--url", server.url, "Hi", "--image", tmp_path / "cow.jpeg")
    run("chat", "--url", server.url, stdin=f"/image {tmp_path / 'cow.bmp'} Hi\n")
    jpeg, png = (asked.body["messages"][0]["content"][0]["image_url"]["url"] for asked in server.asked)
    assert jpeg == f"data:image/jpeg;base64,{base64.b64encode((tmp_path / 'cow.jpeg').read_bytes()).decode()}"
    assert png.startswith("data:image/png;base64,iVBOR")
    (tmp_path / "cow.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    done = run("generate", "--url", server.url, "Hi", "--image", tmp_path / "cow.png")
    assert "cow.png is a broken or unsafe image" in done.stderr
    server.card = {"id": "calf", "modalities": ["text"]}
    done = run("generate", "--url", server.url, "Hi", "--image", tmp_path / "cow.jpeg")
    assert done.stderr == "error: the model calf reads text only, images were given\n"
    assert len(server.asked) == 2


def test_videos_go_as_they_are(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(clip := clips.animation(clips.frames(), kind="gif"))
    run("generate", "--url", server.url, "Hi", "--video", tmp_path / "a.gif", "--video-fps", 1)
    part = server.asked[0].body["messages"][0]["content"][0]
    url = f"data:video/gif;base64,{base64.b64encode(clip).decode()}"
    assert part == {"type": "video_url", "video_url": {"url": url, "fps": 1.0}}


def test_keys_come_from_a_file_or_the_environment(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("sk-file\n")
    (tmp_path / "two").write_text("sk-one\nsk-two\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-open")
    run("generate", "--url", server.url, "Hi")
    monkeypatch.setenv("HERDGRAPH_API_KEY", "sk-herd")
    run("generate", "--url", server.url, "Hi")
    run("generate", "--url", server.url, "Hi", "--api-key-file", tmp_path / "key")
    sent = [asked.headers["Authorization"] for asked in server.asked]
    assert sent == ["Bearer sk-open", "Bearer sk-herd", "Bearer sk-file"]
    done = run("generate", "--url", server.url, "Hi", "--api-key-file", tmp_path / "two")
    assert "two holds no API key: it has to be one word" in done.stderr
    assert "sk-one" not in done.stderr


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_an_answer_in_bytes_of_any_size(server: ScriptedServer) -> None:
    """Lines of either kind, comments, and characters that are cut in two."""
    said = b": keep-alive\n\nevent: message\r\n" + chat_events("Grüße, ", "Kuh 🐄\x1b[2J").replace(b"\n\n", b"\r\n\r\n")
    for size, server.chunked in ((1, True), (7, False), (len(said), True)):
        server.parts = [said[at : at + size] for at in range(0, len(said), size)]
        assert run("generate", "--url", server.url, "Hi").stdout == "Grüße, Kuh 🐄\x1b[2J\n"


def test_json_tells_what_the_server_tells(server: ScriptedServer) -> None:
    entry = {"token": "Hel", "logprob": -0.5, "bytes": None, "top_logprobs": [{"token": "Good", "logprob": -1}]}
    plain = chat_events("Hel", "lo", finish="length", usage=USAGE)
    rich = events({"choices": [{"delta": {"content": "Hel"}, "token_ids": [7], "logprobs": {"content": [entry]}}]},
                  {"choices": [{"delta": {}, "token_ids": [8, 9], "finish_reason": "stop"}]})
    server.parts = [plain]
    first = json.loads(run("generate", "--url", server.url, "Hi", "--json").stdout)
    server.parts, server.card = [rich], {"id": "calf", "owned_by": "vllm"}
    second = json.loads(run("generate", "--url", server.url, "Hi", "--json", "--logprobs", 1).stdout)
    times = [document["timings"].pop(name) for document in (first, second)
             for name in ("prefill_seconds", "decode_seconds")]
    assert all(0 <= seconds < 5 for seconds in times)
    assert first == {"text": "Hello", "finish_reason": "length",
                     "timings": {"prompt_tokens": 9, "cached_tokens": 4, "new_tokens": 3}}
    assert second == {"text": "Hel", "token_ids": [7, 8, 9], "finish_reason": "stop",
                      "timings": {"prompt_tokens": 0, "cached_tokens": 0, "new_tokens": 3},
                      "logprobs": [{"text": "Hel", "logprob": -0.5, "top": [{"text": "Good", "logprob": -1.0}]}]}
    body = server.asked[-1].body
    assert (body["logprobs"], body["top_logprobs"], body["return_token_ids"]) == (True, 1, True)


def test_log_probabilities_of_a_text(server: ScriptedServer) -> None:
    lists = {"tokens": ["a", "b"], "token_logprobs": [-1.0, None], "top_logprobs": [{"b": -2.0, "a": -1.0}, None]}
    server.parts = [events({"choices": [{"text": "ab", "logprobs": lists | {"token_logprobs": [-1.0, -3]}}]})]
    said = json.loads(run("generate", "--url", server.url, "Hi", "--raw", "--json", "--logprobs", 2).stdout)["logprobs"]
    assert [(entry["text"], entry["logprob"]) for entry in said] == [("a", -1.0), ("b", -3.0)]
    assert [other["text"] for other in said[0]["top"]] == ["a", "b"]


def test_a_chat_goes_on_after_an_answer_that_failed(server: ScriptedServer, tmp_path: Path) -> None:
    """The failed turn is not kept, options stay, and what the server decides is called so."""
    server.parts = (part for part in [chat_events("Hello")])  # the second reply is empty
    said = ["Hi", "Again", f"/save {tmp_path / 'chat.json'}", "/set temperature 0.5", "/set"]
    done = run("chat", "--url", server.url, stdin="\n".join(said))
    assert "breaks off: the connection ended in the middle" in done.stderr
    assert json.loads((tmp_path / "chat.json").read_text()) == [HI, {"role": "assistant", "content": "Hello"}]
    shown = dict(line.split("  ", 1) for line in done.stderr.splitlines() if "  " in line)
    assert {name: shown[name].strip() for name in ("temperature", "top-p", "max-new-tokens", "seed")} == {
        "temperature": "0.5", "top-p": "the server's own", "max-new-tokens": "256", "seed": "another each time"}
    assert [message["content"] for message in server.asked[1].body["messages"]] == ["Hi", "Hello", "Again"]


# -- what goes wrong -------------------------------------------------------------------------------------------------

OPENAI_ERROR = json.dumps({"error": {"message": "the prompt is\ntoo \x1b[2J long", "code": None}}).encode()
PAGE = b"<html><head><style>p {}</style><title>502 Bad Gateway</title></head><body><h1>nginx</h1></body></html>"


@pytest.mark.parametrize(("script", "message"), [
    ({"status": 400, "parts": [OPENAI_ERROR]}, "refuses with status 400: the prompt is too \\x1b[2J long"),
    ({"status": 422, "parts": [b'{"detail": "no such model"}']}, "refuses with status 422: no such model"),
    ({"status": 502, "parts": [PAGE], "kind": "text/html"}, "refuses with status 502: 502 Bad Gateway nginx"),
    ({"status": 401, "parts": []}, "status 401: it does not say why; is the right API key given?"),
    ({"status": 500, "parts": [b"x" * 99999]}, f"status 500: {'x' * 300}…"),
    ({"status": 307, "parts": [], "headers": {"Location": "http://elsewhere/"}}, "sends to http://elsewhere/: give"),
    ({"kind": "text/html", "parts": [PAGE]}, "answers with text/html, text/event-stream is needed"),
    ({"parts": [begun("Hello")]}, "breaks off: the connection ended in the middle"),
    ({"parts": [begun("Hello")[:-20]]}, "breaks off: the connection ended in the middle"),
    ({"parts": [begun("Hello")], "cut": True}, "breaks off: the connection ended in the middle"),
    ({"parts": [begun("Hello")], "cut": True, "chunked": True}, "the connection ended in the middle"),
    ({"parts": [events({"error": {"message": "out of memory"}})]}, "failed in the middle of the answer: out of memory"),
    ({"parts": [events({"object": "error", "message": "out of memory"})]}, "the middle of the answer: out of memory"),
    ({"parts": [b"data: {]\n\n"]}, "cannot be read as JSON"),
    ({"parts": [events([])]}, "sent an event that is no JSON object"),
    ({"parts": [events({"choices": {}})]}, "the server sent choices {}, which is of the wrong kind"),
    ({"parts": [events({"choices": [{"delta": {"content": 5}}]})]}, "the server sent content 5"),
    ({"parts": [events({"choices": [{"finish_reason": "[red]\x1b"}]})]}, "the server sent the finish_reason"),
    ({"parts": [b"data: " + b"x" * 3000]}, "sent an event of more than 2000 bytes"),
    ({"parts": [b"data: x\n" * 300]}, "sent an event of more than 2000 bytes"),
])
def test_failures_are_one_line(
    script: dict[str, Any], message: str, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("herdgraph.runtimes.client.events.EVENT_BYTES", 2000)
    vars(server).update(script)
    done = run("generate", "--url", server.url, "Hi")
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == done.returncode == 1


def test_a_server_that_hangs(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENCE_SECONDS", 0.1)
    over = threading.Event()
    server.then = lambda: over.wait(5)
    server.parts = [begun("Hello")]
    done = run("generate", "--url", server.url, "Hi")
    over.set()
    assert "breaks off: nothing came for too long" in done.stderr


def test_an_answer_is_stopped_while_the_server_says_nothing(server: ScriptedServer) -> None:
    """The connection is closed, from which the server sees that nobody waits."""
    over, stopped = threading.Event(), threading.Event()
    server.then = lambda: over.wait(5)
    server.parts = [begun("Hello")]
    remote = RemoteServer(Address.of(server.url))
    stream, started = remote.stream([HI], max_new_tokens=5), time.monotonic()
    with remote.stopped_by(stopped.is_set):
        deltas = iter(stream)
        assert next(deltas) == "Hello"
        stopped.set()
        with pytest.raises(StoppedError):
            next(deltas)
    over.set()
    assert stream.result.text == "Hello"
    assert time.monotonic() - started < 2


def test_nobody_is_there(server: ScriptedServer) -> None:
    with ScriptedServer() as gone:
        pass
    assert "cannot be reached: Connection refused" in run("generate", "--url", gone.url, "Hi").stderr
    assert "cannot be reached: " in run("generate", "--url", "http://no.such.host.invalid", "Hi").stderr
    assert "no TLS" in run("generate", "--url", server.url.replace("http", "https"), "Hi").stderr
    server.card = {"name": "calf"}
    assert "/v1/models is no list of models" in run("chat", "--url", server.url).stderr


@pytest.mark.parametrize(("words", "message"), [
    (["chat"], "Give BUNDLE or --url URL, one of them."),
    (["generate", "bundle", "Hi", "--url", "http://x"], "Give BUNDLE or --url URL, one of them."),
    (["chat", "--url", "http://x", "--threads", 2], "--threads, --memory and --device belong to BUNDLE"),
    (["chat", "--url", "http://x", "--memory", "fast"], "--threads, --memory and --device belong to BUNDLE"),
    (["generate", "bundle", "Hi", "--model", "x"], "--model and --api-key-file belong to --url"),
    (["generate", "Hi", "--url", "http://x", "--raw", "--image", "x"], "--raw with --url sends a text only"),
    (["generate", "Hi", "--url", "http://x", "--raw", "--system", "x"], "--system is said through the chat template"),
])
def test_words_that_do_not_go_together(words: list[Any], message: str) -> None:
    done = run(*words)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
