"""Spans of OpenTelemetry: what they say, to which trace they belong, and that they arrive by HTTP."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

from herdgraph.errors import HerdError
from herdgraph.runtimes.server.app import create_app
from herdgraph.runtimes.server.options import ServerOptions
from herdgraph.runtimes.server.tracing import Traces
from support.fake_service import FakeService

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Where the spans of servers go that are made in this test."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(Traces, "to", lambda endpoint, model: Traces(model, SimpleSpanProcessor(exporter)))
    return exporter


@pytest.fixture
def traced(client_of: Callable[..., TestClient], spans: InMemorySpanExporter) -> TestClient:
    return client_of(otlp_traces_endpoint="http://collector/v1/traces")


def test_a_span_says_what_vllm_says(traced: TestClient, spans: InMemorySpanExporter) -> None:
    asked = CHAT | {"temperature": 0.5, "top_p": 0.9, "max_tokens": 100, "n": 2}
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-request-id": "r-1"}
    assert traced.post(PATH, json=asked, headers=headers).status_code == 200
    (span,) = spans.get_finished_spans()
    assert (span.name, span.kind) == ("llm_request", SpanKind.SERVER)
    assert f"{span.context.trace_id:032x}" == TRACE
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    told = dict(span.attributes or {})
    times = {name: told.pop(name) for name in list(told) if name.startswith("gen_ai.latency.")}
    assert told.pop("gen_ai.usage.prompt_tokens") > 10
    assert told == {
        "gen_ai.response.model": "calf", "gen_ai.request.id": "r-1", "gen_ai.request.n": 2,
        "gen_ai.request.max_tokens": 100, "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 0.9,
        "gen_ai.usage.completion_tokens": 15, "http.response.status_code": 200}
    assert {name.removeprefix("gen_ai.latency.") for name in times} == {
        "time_to_first_token", "e2e", "time_in_queue", "time_in_model_prefill", "time_in_model_decode",
        "time_in_model_inference"}
    assert times["gen_ai.latency.time_in_queue"] == 0.001
    assert span.end_time is not None
    assert span.start_time is not None
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(times["gen_ai.latency.e2e"], abs=0.05)
    assert span.resource.attributes["service.name"] == "herdgraph"


def test_which_requests_have_spans(traced: TestClient, spans: InMemorySpanExporter, service: FakeService) -> None:
    traced.get("/health")
    traced.post(PATH, json={})
    unsampled = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-00"}
    traced.post(PATH, json=CHAT, headers=unsampled)
    assert not spans.get_finished_spans()
    traced.post(PATH, json=CHAT, headers={"traceparent": "nonsense"})
    service.fails_after = 2
    traced.post("/v1/completions", json={"prompt": ["a", "b"]})
    assert [span.status.status_code for span in spans.get_finished_spans()] == [StatusCode.UNSET, StatusCode.ERROR]


@pytest.fixture
def collector() -> Iterator[tuple[str, queue.Queue[bytes]]]:
    """A receiver of OTLP over HTTP, and the bodies that it got."""
    received = queue.Queue[bytes]()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.put(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
        server.shutdown()


def test_spans_arrive(
    service: FakeService, collector: tuple[str, queue.Queue[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, received = collector
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "barn")
    client = TestClient(create_app(service, ServerOptions(names=("calf",), otlp_traces_endpoint=url)))
    assert client.post(PATH, json=CHAT).status_code == 200
    (told,) = ExportTraceServiceRequest.FromString(received.get(timeout=10)).resource_spans
    assert [item.value.string_value for item in told.resource.attributes if item.key == "service.name"] == ["barn"]
    assert [span.name for span in told.scope_spans[0].spans] == ["llm_request"]


def test_endpoints_that_are_none(service: FakeService) -> None:
    with pytest.raises(HerdError, match="OTLP over HTTP such as"):
        create_app(service, ServerOptions(names=("calf",), otlp_traces_endpoint="grpc://localhost:4317"))


def test_without_the_extra(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, Traces.__module__)
    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter.otlp")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(HerdError, match=r"traces need the package opentelemetry.*pip install 'herdgraph\[otel\]'"):
        create_app(service, ServerOptions(names=("calf",), otlp_traces_endpoint="http://localhost:4318/v1/traces"))
