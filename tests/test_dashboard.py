"""The Grafana dashboard asks for metrics that exist, by labels that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from gateway.metrics import GatewayMetrics
from gateway.worker_metrics import WorkersCollector
from gpu_worker.metrics import EngineCollector, RequestMetrics
from protos.wint2.scheduler.v1.scheduler_pb2 import Worker
from tests.fakes_model import make_engine
from tests.size import ROOT

DASHBOARD = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
METRIC = re.compile(r"\bwint2[:_]\w+")
SUFFIXES = re.compile(r"_(bucket|count|sum|created)$")


def published() -> set[str]:
    """The names of all families of the gateway and of a worker, as Prometheus reads them."""
    gateway = GatewayMetrics()
    gateway.registry.register(WorkersCollector(lambda: [Worker()]))
    worker = CollectorRegistry()
    RequestMetrics(worker, "m")
    worker.register(EngineCollector(make_engine().stats, "m", ("wint2:",)))
    text = generate_latest(gateway.registry).decode() + generate_latest(worker).decode()
    return set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))


def expressions() -> Iterator[str]:
    yield from (target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ()))
    yield from (
        variable["query"]["query"]
        for variable in DASHBOARD["templating"]["list"]
        if variable["type"] == "query"
    )


def test_every_metric_exists():
    asked = {SUFFIXES.sub("", name) for text in expressions() for name in METRIC.findall(text)}
    assert len(asked) > 20
    assert not asked - published()


def test_panels_do_not_overlap_and_fit():
    taken = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24


@pytest.mark.parametrize("text", list(expressions()))
def test_brackets_close(text):
    for opening, closing in ("()", "[]", "{}"):
        assert text.count(opening) == text.count(closing)
