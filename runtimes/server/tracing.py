"""A span of OpenTelemetry for every request that generates, with the attributes that vLLM gives it.

It needs the extra ``otel``, so that only ``app`` imports it, where an operator asks for spans.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Self

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ...errors import HerdError, shown
from .records import Record


class Traces:
    """Makes spans of requests that have ended.

    Args:
        model: its name.
        processor: takes the spans.
    """

    def __init__(self, model: str, processor: SpanProcessor) -> None:
        resource = Resource({"service.name": "herdgraph"}).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(processor)
        self._model, self._tracer = model, provider.get_tracer(__name__)

    @classmethod
    def to(cls, endpoint: str, model: str) -> Self:
        """Spans that go to a collector, several at a time, on a thread that ends with the process.

        Args:
            endpoint: address that takes spans by OTLP over HTTP.
            model: its name.

        Raises:
            HerdError: the address is none of HTTP.
        """
        if not endpoint.startswith(("http://", "https://")):
            raise HerdError(f"the endpoint of traces is {shown(endpoint)}, give a URL of OTLP over HTTP such as "
                            "http://localhost:4318/v1/traces")
        return cls(model, BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))

    def add(self, record: Record, headers: Mapping[str, str]) -> None:
        """Make the span of a request, which has just ended; it belongs to the trace that ``traceparent`` names."""
        end = time.time_ns()
        span = self._tracer.start_span(
            "llm_request", TraceContextTextMapPropagator().extract(headers), SpanKind.SERVER, self._attributes(record),
            start_time=end - round(record.seconds * 1e9))
        if record.status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(end)

    def _attributes(self, record: Record) -> dict[str, str | int | float]:
        """Those that are known; times of several prompts are those of the slowest."""
        queue, prefill, decode, inference = (max(times) for times in zip(*(
            (usage.queue_seconds, usage.first_token_seconds - usage.queue_seconds,
             usage.total_seconds - usage.first_token_seconds, usage.total_seconds - usage.queue_seconds)
            for usage in record.usage), strict=True))
        found = {
            "gen_ai.response.model": self._model, "gen_ai.request.id": record.request_id,
            "gen_ai.request.n": record.choices, "gen_ai.request.max_tokens": record.most_tokens,
            "gen_ai.request.temperature": record.temperature, "gen_ai.request.top_p": record.top_p,
            "gen_ai.usage.prompt_tokens": record.total("prompt_tokens"),
            "gen_ai.usage.completion_tokens": record.total("completion_tokens"),
            "gen_ai.latency.time_to_first_token": record.first_token, "gen_ai.latency.e2e": record.seconds,
            "gen_ai.latency.time_in_queue": queue, "gen_ai.latency.time_in_model_prefill": max(0.0, prefill),
            "gen_ai.latency.time_in_model_decode": max(0.0, decode),
            "gen_ai.latency.time_in_model_inference": max(0.0, inference), "http.response.status_code": record.status}
        return {name: value for name, value in found.items() if value is not None}
