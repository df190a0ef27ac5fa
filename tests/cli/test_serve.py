"""The serve command as a process: it says where it answers, lets requests end when it is asked to end, and logs."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from support.command_line import run
from support.processes import worker_environment

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server, and a client of it."""
    command = [sys.executable, "-m", "herdgraph", "serve", str(bundle), "--port", "0", "-t", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=worker_environment()) as process:
        try:
            assert process.stderr
            for line in process.stderr:
                if match := re.search(r"^serving (.*) at (http://127\.0\.0\.1:\d+)$", line):
                    break
            assert match[1] == bundle.name
            with httpx.Client(base_url=match[2], timeout=20) as client:
                yield process, client
        finally:
            process.kill()


def test_requests_end_before_the_server_does(paths: tuple[Path, Path]) -> None:
    with serving(paths[1]) as (process, client):
        assert client.get("/ready").status_code == 200
        reply = client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 4, "seed": 1})
        assert reply.json()["usage"]["completion_tokens"] == 4
        assert "server" not in reply.headers
        long = CHAT | {"stream": True, "max_tokens": 1000}
        with client.stream("POST", "/v1/chat/completions", json=long) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 5
            with httpx.Client(base_url=client.base_url) as other:
                while (ready := other.get("/ready")).status_code == 200 and time.monotonic() < deadline:
                    pass
                refused = other.post("/v1/chat/completions", json=CHAT)
            events = [line for line in lines if line]
        assert ready.status_code == refused.status_code == 503
        assert refused.headers["connection"] == "close"
        assert events[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in events[-2]
        out, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    logged = [json.loads(line) for line in out.splitlines()]
    assert max(line.get("completion_tokens", 0) for line in logged) == 1000


def test_a_second_signal_ends_it_at_once(paths: tuple[Path, Path]) -> None:
    with serving(paths[1]) as (process, client), client.stream(
        "POST", "/v1/chat/completions", json=CHAT | {"stream": True, "max_tokens": 4000}
    ) as stream:
        next(stream.iter_lines())
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 128 + signal.SIGINT, errors
        assert "Traceback" not in errors


def test_a_port_that_is_taken(paths: tuple[Path, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", paths[1], "--port", port)
    assert done.returncode == 1
    assert done.stderr == (f"error: cannot listen at port {port} of 127.0.0.1: Address already in use; choose another "
                           "by --port or --host\n")


def test_what_is_wrong_is_told_before_the_model_loads(paths: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, bundle = paths
    assert "is a checkpoint" in run("serve", checkpoint).stderr
    (tmp_path / "keys").write_text("# none\n")
    done = run("serve", bundle, "--api-keys", tmp_path / "keys")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "has no API key" in done.stderr
