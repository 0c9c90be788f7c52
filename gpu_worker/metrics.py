"""What the engine did, as Prometheus metrics: vLLM's names under this project's prefix, or under both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gpu_worker.engine.block_ages import AGE_BUCKETS, Ages, BlockAges
from gpu_worker.engine.engine import STEP_TOKENS, EngineStats
from gpu_worker.engine.sequence import Request, StepOutput, Timings

PREFIX = "wint2:"
VLLM_PREFIX = "vllm:"

# Seconds until something has happened once, between tokens, and for a whole request.
FIRST_TOKEN_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
TOKEN_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
REQUEST_BUCKETS = (
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
    7680,
)
COUNT_BUCKETS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))

HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", FIRST_TOKEN_BUCKETS),
    "inter_token_latency_seconds": ("Between two tokens of a completion.", TOKEN_BUCKETS),
    "time_per_output_token_seconds": ("The same, by its older name.", TOKEN_BUCKETS),
    "request_time_per_output_token_seconds": ("Mean time of a token after the first.", TOKEN_BUCKETS),
    "e2e_request_latency_seconds": ("From a request's arrival to its end.", REQUEST_BUCKETS),
    "request_queue_time_seconds": ("From arrival to the first scheduled step.", REQUEST_BUCKETS),
    "request_prefill_time_seconds": ("From the first scheduled step to the first token.", REQUEST_BUCKETS),
    "request_decode_time_seconds": ("From the first token to the last.", REQUEST_BUCKETS),
    "request_inference_time_seconds": ("From the first scheduled step to the last token.", REQUEST_BUCKETS),
    "request_prompt_tokens": ("Prompt tokens of a request.", COUNT_BUCKETS),
    "request_generation_tokens": ("Completion tokens of a request.", COUNT_BUCKETS),
    "request_max_num_generation_tokens": ("Tokens of a request's longest completion.", COUNT_BUCKETS),
    "request_params_n": ("Completions asked for.", COUNT_BUCKETS),
    "request_params_max_tokens": ("max_tokens asked for, where it was.", COUNT_BUCKETS),
}


@dataclass(frozen=True)
class EngineMetric:
    """A number of `EngineStats` under its published name."""

    name: str
    help: str
    read: Callable[[EngineStats], float]
    is_total: bool = False


ENGINE_METRICS = (
    EngineMetric("num_requests_running", "Sequences in the running set.", lambda s: s.num_running),
    EngineMetric("num_requests_waiting", "Sequences that wait.", lambda s: s.num_waiting),
    EngineMetric(
        "kv_cache_usage_perc",
        "Share of KV blocks in use, 0 to 1.",
        lambda s: s.num_used_blocks / max(s.num_blocks, 1),
    ),
    EngineMetric(
        "gpu_cache_usage_perc",
        "The same, by its older name.",
        lambda s: s.num_used_blocks / max(s.num_blocks, 1),
    ),
    EngineMetric("kv_cache_blocks", "KV blocks in all.", lambda s: s.num_blocks),
    EngineMetric(
        "pending_prefill_tokens", "Prompt tokens not yet computed.", lambda s: s.num_pending_prefill_tokens
    ),
    EngineMetric("engine_steps", "Steps computed.", lambda s: s.num_steps_total, is_total=True),
    EngineMetric(
        "prompt_tokens", "Prompt tokens taken up.", lambda s: s.num_prompt_tokens_total, is_total=True
    ),
    EngineMetric(
        "generation_tokens", "Tokens generated.", lambda s: s.num_generation_tokens_total, is_total=True
    ),
    EngineMetric("num_preemptions", "Sequences put back.", lambda s: s.num_preemptions_total, is_total=True),
    EngineMetric(
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.num_prefix_lookup_tokens_total,
        is_total=True,
    ),
    EngineMetric(
        "prefix_cache_hits",
        "Prompt tokens found in the prefix cache.",
        lambda s: s.num_prefix_hit_tokens_total,
        is_total=True,
    ),
)


BLOCK_HISTOGRAMS: dict[str, tuple[str, Callable[[BlockAges], Ages]]] = {
    "kv_block_lifetime_seconds": ("From a block's allocation to its eviction.", lambda a: a.lifetime),
    "kv_block_idle_before_evict_seconds": (
        "From a block's last use to its eviction.",
        lambda a: a.idle_before_evict,
    ),
    "kv_block_reuse_gap_seconds": ("From a block's last use to the next.", lambda a: a.reuse_gap),
}


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What the collector asks of an engine besides its stats."""

    silence_ms: Callable[[], int] = lambda: 0
    expert_tokens: Callable[[], Mapping[int, Sequence[int]]] = dict
    cache_config: Mapping[str, str] = field(default_factory=dict)


class EngineCollector(Collector):
    """Reads the engine's numbers when they are scraped; the step pays nothing."""

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        model_name: str,
        prefixes: Sequence[str],
        facts: EngineFacts | None = None,
    ) -> None:
        self._stats = stats
        self._model_name = model_name
        self._prefixes = prefixes
        self._facts = facts or EngineFacts()

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for prefix in self._prefixes:
            yield from self._numbers(prefix, stats)
            yield self._step_sizes(prefix, stats)
            yield from self._block_ages(prefix, stats.block_ages)
            yield self._silence(prefix)
            yield self._cache_config(prefix)
            yield self._expert_tokens(prefix)

    def _numbers(self, prefix: str, stats: EngineStats) -> Iterator[Metric]:
        for metric in ENGINE_METRICS:
            kind = CounterMetricFamily if metric.is_total else GaugeMetricFamily
            family = kind(prefix + metric.name, metric.help, labels=("model_name",))
            family.add_metric((self._model_name,), metric.read(stats))
            yield family

    def _step_sizes(self, prefix: str, stats: EngineStats) -> Metric:
        family = HistogramMetricFamily(
            f"{prefix}iteration_tokens_total", "Tokens computed in a step.", labels=("model_name",)
        )
        counts = accumulate(stats.num_steps_by_tokens)
        buckets = list(zip([*map(str, STEP_TOKENS), "+Inf"], counts, strict=True))
        family.add_metric((self._model_name,), buckets, stats.num_tokens_total)
        return family

    def _block_ages(self, prefix: str, ages: BlockAges) -> Iterator[Metric]:
        for name, (text, read) in BLOCK_HISTOGRAMS.items():
            family = HistogramMetricFamily(prefix + name, text, labels=("model_name",))
            known = read(ages)
            buckets = list(zip([*map(str, AGE_BUCKETS), "+Inf"], accumulate(known.counts), strict=True))
            family.add_metric((self._model_name,), buckets, known.seconds)
            yield family

    def _silence(self, prefix: str) -> Metric:
        family = GaugeMetricFamily(
            f"{prefix}engine_silence_seconds",
            "Since the last step, if there is work.",
            labels=("model_name",),
        )
        family.add_metric((self._model_name,), self._facts.silence_ms() / 1e3)
        return family

    def _cache_config(self, prefix: str) -> Metric:
        config = self._facts.cache_config
        family = GaugeMetricFamily(
            f"{prefix}cache_config_info", "The KV cache, as labels.", labels=("model_name", *config)
        )
        family.add_metric((self._model_name, *config.values()), 1)
        return family

    def _expert_tokens(self, prefix: str) -> Metric:
        family = CounterMetricFamily(
            f"{prefix}expert_tokens", "Tokens given to an expert.", labels=("model_name", "layer", "expert")
        )
        for layer, counts in self._facts.expert_tokens().items():
            for expert, count in enumerate(counts):
                family.add_metric((self._model_name, str(layer), str(expert)), count)
        return family


class RequestMetrics:
    """Distributions over requests, fed by the servicer."""

    def __init__(
        self, registry: CollectorRegistry, model_name: str, prefixes: Sequence[str] = (PREFIX,)
    ) -> None:
        self._histograms: dict[str, list[Histogram]] = {}
        for name, (text, buckets) in HISTOGRAMS.items():
            self._histograms[name] = [
                Histogram(prefix + name, text, ("model_name",), buckets=buckets, registry=registry).labels(
                    model_name
                )
                for prefix in prefixes
            ]
        self._endings = [
            Counter(
                f"{prefix}request_success",
                "Requests by how they ended.",
                ("model_name", "finished_reason"),
                registry=registry,
            )
            for prefix in prefixes
        ]
        self._model_name = model_name

    def start(self, request: Request) -> RequestObserver:
        return RequestObserver(self, request)

    def observe(self, name: str, value: float) -> None:
        for histogram in self._histograms[name]:
            histogram.observe(value)

    def count_end(self, reason: str) -> None:
        for counter in self._endings:
            counter.labels(self._model_name, reason).inc()


class RequestObserver:
    """Follows one request from its arrival to the end of its last completion."""

    def __init__(self, metrics: RequestMetrics, request: Request) -> None:
        self._metrics = metrics
        self._request = request
        self._last_times: dict[int, float] = {}  # by completion
        self._lengths: list[int] = []  # of the completions that have ended

    def add(self, output: StepOutput) -> None:
        now = time.monotonic()
        if output.token_ids:
            self._add_tokens(output.index, len(output.token_ids), now)
        if output.finish_reason is not None:
            self._lengths.append(output.num_completion_tokens)
            if len(self._lengths) == self._request.params.n:
                self._end(output, now)

    def _add_tokens(self, index: int, num_tokens: int, now: float) -> None:
        if index in self._last_times:
            for _ in range(num_tokens):
                latency = (now - self._last_times[index]) / num_tokens
                self._metrics.observe("inter_token_latency_seconds", latency)
                self._metrics.observe("time_per_output_token_seconds", latency)
        elif index == 0:
            self._metrics.observe("time_to_first_token_seconds", now - self._request.arrival_time)
        self._last_times[index] = now

    def _end(self, output: StepOutput, now: float) -> None:
        observe, params = self._metrics.observe, self._request.params
        observe("e2e_request_latency_seconds", now - self._request.arrival_time)
        observe("request_prompt_tokens", output.num_prompt_tokens)
        observe("request_generation_tokens", sum(self._lengths))
        observe("request_max_num_generation_tokens", max(self._lengths))
        observe("request_params_n", params.n)
        if params.max_tokens is not None:
            observe("request_params_max_tokens", params.max_tokens)
        if output.timings is not None:
            self._observe_timings(output.timings, output.num_completion_tokens)
        self._metrics.count_end(str(output.finish_reason))

    def _observe_timings(self, spent: Timings, num_tokens: int) -> None:
        observe = self._metrics.observe
        observe("request_queue_time_seconds", spent.queue_seconds)
        observe("request_prefill_time_seconds", spent.prefill_seconds)
        observe("request_decode_time_seconds", spent.decode_seconds)
        observe("request_inference_time_seconds", spent.prefill_seconds + spent.decode_seconds)
        if num_tokens > 1:
            observe("request_time_per_output_token_seconds", spent.decode_seconds / (num_tokens - 1))
