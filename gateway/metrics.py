"""What the gateway measures: every figure as its client sees it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector

from gateway.requests import Event, Started, TextPiece
from protos.wint2.common.v1.common_pb2 import FinishReason

PREFIX = "wint2_gateway"
# Seconds; the long tail is there for prompts of tens of thousands of tokens on a busy worker.
TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.28,
    2.56,
    5,
    10,
    20,
    40,
    80,
    160,
    640,
)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 10, 40)
DURATION_BUCKETS = (
    0.1,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
    1920,
)


class GatewayMetrics:
    """All metrics, in a registry of their own. `published` is what scrapes see.

    Several processes count in files in the `shared` folder, of which each publishes the sum.
    """

    def __init__(self, shared: Path | None = None) -> None:
        self.registry = registry = CollectorRegistry()
        self.published = registry
        if shared is not None:
            self.published = CollectorRegistry()
            MultiProcessCollector(self.published, str(shared))  # type: ignore[no-untyped-call]

        def histogram(name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", documentation, buckets=buckets, registry=registry)

        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}_{name}_total", documentation, labels, registry=registry)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From a choice's start to its first text or token", TTFT_BUCKETS
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds",
            "Gap between tokens of a choice, queued bursts shared out",
            TOKEN_BUCKETS,
        )
        self.time_per_output_token = histogram(
            "time_per_output_token_seconds", "(duration - time to first token) / (tokens - 1)", TOKEN_BUCKETS
        )
        self.request_duration = histogram(
            "request_duration_seconds", "From a choice's start to its last event", DURATION_BUCKETS
        )
        self.num_requests_in_flight = Gauge(
            f"{PREFIX}_num_requests_in_flight",
            "Requests accepted and not yet answered to the end",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens taken up")
        self.generation_tokens = counter("generation_tokens", "Completion tokens delivered")
        self.request_success = counter("request_success", "Finished choices", "finished_reason")
        self.request_errors = counter("request_errors", "Requests answered with an error", "code")
        self.http_requests = counter("http_requests", "HTTP requests", "path", "status")

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[None]:
        with self.num_requests_in_flight.track_inprogress():
            yield

    @contextlib.contextmanager
    def observe_choice(self) -> Iterator[ChoiceObserver]:
        observer = ChoiceObserver(self)
        try:
            yield observer
        finally:
            observer.close()


class ChoiceObserver:
    """Watches the events of one choice go by."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._started = time.perf_counter()
        self._first: float | None = None
        self._last = self._started
        self._num_tokens = 0
        self._has_started = False
        self._outcome = "aborted"

    @property
    def has_tokens(self) -> bool:
        return self._first is not None

    def on_event(self, event: Event) -> bool:
        """Whether the event is news: a choice starts once, however many workers it takes."""
        if isinstance(event, Started):
            is_news, self._has_started = not self._has_started, True
            return is_news
        if isinstance(event, TextPiece):
            self._on_tokens(max(len(event.token_ids), 1))
        else:
            self._outcome = FinishReason.Name(event.reason).removeprefix("FINISH_REASON_").lower()
            self._metrics.prompt_tokens.inc(event.usage.prompt_tokens)
        return True

    def close(self) -> None:
        metrics = self._metrics
        metrics.request_success.labels(self._outcome).inc()
        metrics.request_duration.observe(time.perf_counter() - self._started)
        metrics.generation_tokens.inc(self._num_tokens)
        if self._first is not None and self._num_tokens > 1:
            metrics.time_per_output_token.observe((self._last - self._first) / (self._num_tokens - 1))

    def _on_tokens(self, count: int) -> None:
        now = time.perf_counter()
        if self._first is None:
            self._first = now
            self._metrics.time_to_first_token.observe(now - self._started)
        else:
            self._metrics.inter_token_latency.observe((now - self._last) / count)
        self._last = now
        self._num_tokens += count
