"""A server that says what a test scripts, byte by byte, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

Write = Callable[[bytes], None]


@dataclass
class Asked:
    """A request."""

    path: str
    headers: dict[str, str]
    body: Any


def events(*values: Any, done: bool = True) -> bytes:
    """A stream of events."""
    said = "".join(f"data: {json.dumps(value, ensure_ascii=False)}\n\n" for value in values)
    return (said + ("data: [DONE]\n\n" if done else "")).encode()


def begun(*texts: str) -> bytes:
    """A chat's answer so far."""
    return events({"choices": [{"delta": {"role": "assistant", "content": ""}}]},
                  *({"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in texts), done=False)


def chat_events(*texts: str, finish: str = "stop", usage: dict[str, Any] | None = None) -> bytes:
    """A chat that is answered by some deltas."""
    end = {"choices": [{"delta": {}, "finish_reason": finish}]}
    return begun(*texts) + events(end, {"choices": [], "usage": usage})


@dataclass
class ScriptedServer:
    """Answers ``/v1/models``, and everything else by its script.

    Attributes:
        parts: what a reply consists of, each sent on its own.
        status: of a reply.
        kind: content type of a reply.
        headers: further ones of a reply.
        chunked: whether each part of a reply is a chunk.
        cut: whether the reply says that it is longer than it is.
        then: called after the last part, while the connection is still open.
        card: what it says of its model, empty where it has no list of models.
        asked: all requests but those for its models.
    """

    parts: Iterable[bytes] = (chat_events("Hello"),)
    status: int = 200
    kind: str = "text/event-stream"
    headers: dict[str, str] = field(default_factory=dict)
    chunked: bool = False
    cut: bool = False
    then: Callable[[], object] = lambda: None
    card: dict[str, Any] = field(default_factory=lambda: {"id": "calf"})
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> Self:
        script = self

        class Handler(BaseHTTPRequestHandler):
            """One connection, closed after its reply."""

            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply(200 if script.card else 404, "application/json",
                            [json.dumps({"data": [script.card]}).encode()])

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                script.asked.append(Asked(self.path, dict(self.headers), body))
                self._reply(script.status, script.kind, script.parts)
                script.then()

            def _reply(self, status: int, kind: str, parts: Iterable[bytes]) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Connection", "close")
                for name, value in script.headers.items():
                    self.send_header(name, value)
                chunked = script.chunked and self.command == "POST"
                if chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                elif script.cut and self.command == "POST":
                    self.send_header("Content-Length", "100000")
                self.end_headers()
                for part in parts:
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
                if chunked and not script.cut:
                    self.wfile.write(b"0\r\n\r\n")

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.socket.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"
