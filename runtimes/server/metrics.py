"""Metrics for Prometheus under the names of vLLM 0.33, so that its dashboards and autoscalers work as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .records import Record

_FIRST_TOKEN = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1., 2.5, 5., 7.5, 10., 20., 40., 80., 160., 640.,
                2560.)
_BETWEEN_TOKENS = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1., 2.5, 5., 7.5, 10., 20., 40., 80.)
_LATENCY = (.3, .5, .8, 1., 1.5, 2., 2.5, 5., 10., 15., 20., 30., 40., 50., 60., 120., 240., 480., 960., 1920., 7680.)
_TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
_COUNTS = (1., 2., 5., 10., 20.)
_PREEMPTIONS = (1., 2., 3., 4., 5., 10., 20.)
_STEP_TOKENS = (1., *(float(1 << power) for power in range(3, 15)))

_GAUGES = {
    "running": ("vllm:num_requests_running", "Answers that are being generated."),
    "waiting": ("vllm:num_requests_waiting", "Requests that wait."),
    "kv_cache_usage": ("vllm:kv_cache_usage_perc", "Share of the cache memory that is in use; 1 is all."),
}
_WAITING = {"waiting_capacity": "capacity", "waiting_deferred": "deferred"}
_ACCEPTED_AT = "spec_accepted_at_"
_COUNTERS = {
    "prefix_queries": ("vllm:prefix_cache_queries", "Prompt tokens that were looked for in the prefix cache."),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens that were found there."),
    "mm_queries": ("vllm:mm_cache_queries", "Tiles of pictures that were looked at."),
    "mm_hits": ("vllm:mm_cache_hits", "Tiles whose features were known."),
    "preemptions": ("vllm:num_preemptions", "Answers that gave their memory away and began again."),
    "spec_drafts": ("vllm:spec_decode_num_drafts", "Guesses of several tokens."),
    "spec_draft_tokens": ("vllm:spec_decode_num_draft_tokens", "Tokens that were guessed."),
    "spec_accepted_tokens": ("vllm:spec_decode_num_accepted_tokens", "Tokens that were guessed right."),
}
"""By the service's name: the metric's, and what it says."""


class Metrics:
    """All metrics of one server, in a registry of their own.

    Args:
        model: name for the label ``model_name``.
        gauges: what the service counts itself, by the names above; empty while there is no service.
        cache_config: names and values of its memory of keys and values.
    """

    def __init__(
        self, model: str, gauges: Callable[[], Mapping[str, float]], cache_config: Callable[[], Mapping[str, str]]
    ) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self.registry.register(_ServiceCollector(self._labels, gauges, cache_config))
        self._tokens = {
            "prompt_tokens": self._counter("prompt_tokens", "Prompt tokens."),
            "cached_tokens": self._counter("prompt_tokens_cached", "Prompt tokens from the prefix cache."),
            "completion_tokens": self._counter("generation_tokens", "Generated tokens."),
        }
        self._sources = self._counter("prompt_tokens_by_source", "Prompt tokens by where they came from.", "source")
        self._finished = self._counter("request_success", "Answers by how they ended.", "finished_reason")
        self._rejected = self._counter("admission_rejections", "Requests that were not taken.", "reason")
        self._seconds = {name: self._histogram(name, help_, buckets) for name, (help_, buckets) in _SECONDS.items()}
        self._sizes = {name: self._histogram(name, help_, buckets) for name, (help_, buckets) in _SIZES.items()}
        self._step_tokens = self._histogram("iteration_tokens_total", "Tokens of a call of the model.", _STEP_TOKENS)
        self._http = Counter("http_requests", "Requests.", ("method", "status", "handler"), registry=self.registry)
        self._http_seconds = Histogram("http_request_duration_seconds", "Until the end of the reply.",
                                       ("method", "handler"), buckets=_LATENCY, registry=self.registry)

    def _counter(self, name: str, help_: str, *labels: str) -> Counter:
        return Counter(f"vllm:{name}", help_, (*self._labels, *labels), registry=self.registry)

    def _histogram(self, name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"vllm:{name}", help_, tuple(self._labels), buckets=buckets, registry=self.registry)
        return metric.labels(**self._labels)

    def count_http(self, record: Record, handler: str) -> None:
        """Count a request of any kind; ``handler`` is the pattern of its route, so that labels stay few."""
        method = record.method if record.method in ("GET", "POST", "HEAD", "OPTIONS") else "other"
        self._http.labels(method, str(record.status), handler).inc()
        self._http_seconds.labels(method, handler).observe(record.seconds)

    def count_rejection(self, reason: str) -> None:
        """Count a request that was not taken."""
        self._rejected.labels(**self._labels, reason=reason).inc()

    def count_step(self, tokens: int) -> None:
        """Count a call of the model; on any thread."""
        self._step_tokens.observe(tokens)

    def count_generation(self, record: Record) -> None:
        """Count a request that generated, or was to."""
        for name, counter in self._tokens.items():
            counter.labels(**self._labels).inc(record.total(name))
        for reason, number in record.finished.items():
            self._finished.labels(**self._labels, finished_reason=reason).inc(number)
        cached, computed = record.total("cached_tokens"), record.total("prompt_tokens") - record.total("cached_tokens")
        for source, number in (("local_compute", computed), ("local_cache_hit", cached)):
            self._sources.labels(**self._labels, source=source).inc(number)
        sizes = {"request_prompt_tokens": record.total("prompt_tokens"),
                 "request_generation_tokens": record.total("completion_tokens"),
                 "request_max_num_generation_tokens": record.longest,
                 "request_prefill_kv_computed_tokens": computed, "request_num_preemptions": record.total("preemptions"),
                 "request_params_n": record.choices, "request_params_max_tokens": record.most_tokens}
        for name, size in sizes.items():
            self._sizes[name].observe(size)
        self._count_seconds(record)

    def _count_seconds(self, record: Record) -> None:
        seconds = self._seconds
        if record.first_token is None:
            return
        seconds["time_to_first_token_seconds"].observe(record.first_token)
        for gap in record.gaps:
            seconds["inter_token_latency_seconds"].observe(gap)
        if record.gaps:
            seconds["request_time_per_output_token_seconds"].observe(sum(record.gaps) / len(record.gaps))
        seconds["e2e_request_latency_seconds"].observe(record.seconds)
        for usage in record.usage:
            seconds["request_queue_time_seconds"].observe(usage.queue_seconds)
            seconds["request_prefill_time_seconds"].observe(max(usage.first_token_seconds - usage.queue_seconds, 0))
            seconds["request_decode_time_seconds"].observe(max(usage.total_seconds - usage.first_token_seconds, 0))
            seconds["request_inference_time_seconds"].observe(max(usage.total_seconds - usage.queue_seconds, 0))

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)


_SECONDS = {
    "time_to_first_token_seconds": ("Until the first token.", _FIRST_TOKEN),
    "inter_token_latency_seconds": ("Between two tokens of an answer.", _BETWEEN_TOKENS),
    "request_time_per_output_token_seconds": ("Between tokens, the mean of a request.", _BETWEEN_TOKENS),
    "e2e_request_latency_seconds": ("Until the last token.", _LATENCY),
    "request_queue_time_seconds": ("Until computing began.", _LATENCY),
    "request_prefill_time_seconds": ("From then until the first token.", _LATENCY),
    "request_decode_time_seconds": ("From the first token to the last.", _LATENCY),
    "request_inference_time_seconds": ("From when computing began to the last token.", _LATENCY),
}
_SIZES = {
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens of its answers.", _TOKENS),
    "request_max_num_generation_tokens": ("Tokens of its longest answer.", _TOKENS),
    "request_prefill_kv_computed_tokens": ("Prompt tokens that were computed.", _TOKENS),
    "request_num_preemptions": ("How often its answers gave their memory away.", _PREEMPTIONS),
    "request_params_n": ("Answers that were asked for.", _COUNTS),
    "request_params_max_tokens": ("Length limit of an answer.", _TOKENS),
}


class _ServiceCollector(Collector):
    """Reads what the service counts when Prometheus asks."""

    def __init__(
        self, labels: Mapping[str, str], gauges: Callable[[], Mapping[str, float]],
        cache_config: Callable[[], Mapping[str, str]],
    ) -> None:
        self._labels, self._gauges, self._cache_config = labels, gauges, cache_config

    def collect(self) -> Iterable[Metric]:
        """The metrics; what the service does not know is 0."""
        values, label_values = self._gauges(), list(self._labels.values())
        for name, (metric, help_) in _GAUGES.items():
            gauge = GaugeMetricFamily(metric, help_, labels=list(self._labels))
            gauge.add_metric(label_values, values.get(name, 0.0))
            yield gauge
        yield self._waiting(values)
        yield self._accepted(values)
        yield from self._config()
        for name, (metric, help_) in _COUNTERS.items():
            counter = CounterMetricFamily(metric, help_, labels=list(self._labels))
            counter.add_metric(label_values, values.get(name, 0.0))
            yield counter

    def _waiting(self, values: Mapping[str, float]) -> Metric:
        gauge = GaugeMetricFamily("vllm:num_requests_waiting_by_reason", "Requests that wait: for a place or memory "
                                  "(capacity), or for a prefix that another one is computing (deferred).",
                                  labels=[*self._labels, "reason"])
        for name, reason in _WAITING.items():
            gauge.add_metric([*self._labels.values(), reason], values.get(name, 0.0))
        return gauge

    def _accepted(self, values: Mapping[str, float]) -> Metric:
        counter = CounterMetricFamily("vllm:spec_decode_num_accepted_tokens_per_pos", "Tokens that were guessed right "
                                      "by their place in a guess.", labels=[*self._labels, "position"])
        for name, value in values.items():
            if name.startswith(_ACCEPTED_AT):
                counter.add_metric([*self._labels.values(), name.removeprefix(_ACCEPTED_AT)], value)
        return counter

    def _config(self) -> Iterable[Metric]:
        """The memory of keys and values as labels of a gauge that is 1; as in vLLM without the model's name."""
        if config := self._cache_config():
            gauge = GaugeMetricFamily("vllm:cache_config_info", "The memory of keys and values.",
                                      labels=["engine", *config])
            gauge.add_metric([self._labels["engine"], *config.values()], 1.0)
            yield gauge
