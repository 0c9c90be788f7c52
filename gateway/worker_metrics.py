"""What the workers said last of their load, as metrics of the gateway: one port shows the whole stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.metrics import PREFIX
from protos.wint2.scheduler.v1.scheduler_pb2 import Worker


@dataclass(frozen=True)
class WorkerMetric:
    """A number of a worker's load under its published name."""

    name: str
    help: str
    read: Callable[[Worker], float]


WORKER_METRICS = (
    WorkerMetric("is_serving", "1 while the worker takes requests.", lambda w: w.load.is_serving),
    WorkerMetric("num_requests_running", "Sequences in the running set.", lambda w: w.load.num_running),
    WorkerMetric("num_requests_waiting", "Sequences that wait in the worker.", lambda w: w.load.num_waiting),
    WorkerMetric("num_requests_placed", "Requests that the scheduler placed on it.", lambda w: w.num_placed),
    WorkerMetric(
        "kv_cache_usage_ratio", "Share of KV blocks in use, 0 to 1.", lambda w: w.load.kv_cache_usage_ratio
    ),
    WorkerMetric(
        "generation_tokens_per_second",
        "Tokens generated per second, over the last seconds.",
        lambda w: w.load.generation_tokens_per_second,
    ),
    WorkerMetric(
        "engine_silence_seconds",
        "Since the last step, if there is work.",
        lambda w: w.load.engine_silence_ms / 1e3,
    ),
)


class WorkersCollector(Collector):
    """Reads the list of workers when it is scraped."""

    def __init__(self, workers: Callable[[], Sequence[Worker]]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        workers = self._workers()
        for metric in WORKER_METRICS:
            name = f"{PREFIX}_worker_{metric.name}"
            family = GaugeMetricFamily(name, metric.help, labels=("model_name", "worker"))
            for worker in workers:
                offer = worker.registration
                family.add_metric((offer.model, offer.address), metric.read(worker))
            yield family
