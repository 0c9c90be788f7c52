"""The published numbers are the engine's, under the names that dashboards know."""

from __future__ import annotations

import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gpu_worker.engine.sequence import Request
from gpu_worker.metrics import PREFIX, VLLM_PREFIX, EngineCollector, RequestMetrics
from gpu_worker.sampling_params import SamplingParams
from tests.fakes_model import make_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def published(registry):
    """{sample name: value} summed over labels, and the labels seen."""
    values, labels = {}, set()
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                values[sample.name] = values.get(sample.name, 0) + sample.value
                labels.add(frozenset(sample.labels))
    return values, labels


def run(engine, metrics, *prompts):
    """Completes the prompts as the servicer would; blocks in use after the first step."""
    observers = {}
    for index, prompt in enumerate(prompts):
        request = Request(str(index), prompt, GREEDY, arrival_time=time.monotonic())
        engine.add(request)
        observers[request.request_id] = metrics.start(request)
    while engine.has_work:
        for output in engine.step():
            observers[output.request_id].add(output)


@pytest.fixture
def registry():
    return CollectorRegistry()


def test_counts_and_distributions_agree_with_what_ran(registry):
    engine, metrics = make_engine(), RequestMetrics(registry, "m")
    registry.register(EngineCollector(engine.stats, "m", (PREFIX,)))
    run(engine, metrics, [5, 6, 7], [8, 9, 10, 11])
    values, labels = published(registry)
    assert values["wint2:prompt_tokens_total"] == 7
    assert values["wint2:generation_tokens_total"] == 16
    assert values["wint2:time_to_first_token_seconds_count"] == 2
    assert values["wint2:inter_token_latency_seconds_count"] == 14
    assert values["wint2:e2e_request_latency_seconds_count"] == 2
    assert values["wint2:request_prompt_tokens_sum"] == 7
    assert values["wint2:request_generation_tokens_sum"] == 16
    assert values["wint2:request_params_max_tokens_sum"] == 16
    assert values["wint2:request_success_total"] == 2
    assert values["wint2:num_requests_running"] == values["wint2:num_requests_waiting"] == 0
    assert labels == {frozenset({"model_name"}), frozenset({"model_name", "finished_reason"})}


def test_gauges_show_the_moment(registry):
    engine = make_engine(max_num_seqs=1)
    registry.register(EngineCollector(engine.stats, "m", (PREFIX,)))
    for name in "ab":
        engine.add(Request(name, [5, 6, 7], GREEDY))
    engine.step()
    values, _ = published(registry)
    assert (values["wint2:num_requests_running"], values["wint2:num_requests_waiting"]) == (1, 1)
    assert values["wint2:kv_cache_usage_perc"] == engine.stats().num_used_blocks / 64 > 0


def test_repeated_prompts_show_as_prefix_cache_hits(registry):
    engine, metrics = make_engine(), RequestMetrics(registry, "m")
    registry.register(EngineCollector(engine.stats, "m", (PREFIX,)))
    prompt = list(range(2, 22))
    run(engine, metrics, prompt)
    run(engine, metrics, prompt)
    values, _ = published(registry)
    assert values["wint2:prefix_cache_hits_total"] >= 16
    assert values["wint2:prefix_cache_queries_total"] >= values["wint2:prefix_cache_hits_total"]


def test_vllm_names_repeat_every_number(registry):
    engine, prefixes = make_engine(), (PREFIX, VLLM_PREFIX)
    metrics = RequestMetrics(registry, "m", prefixes)
    registry.register(EngineCollector(engine.stats, "m", prefixes))
    run(engine, metrics, [5, 6, 7])
    values, _ = published(registry)
    ours = {name.removeprefix(PREFIX): value for name, value in values.items() if name.startswith(PREFIX)}
    theirs = {
        name.removeprefix(VLLM_PREFIX): value
        for name, value in values.items()
        if name.startswith(VLLM_PREFIX)
    }
    created = [name for name in ours if name.endswith("_created")]
    for name in created:
        del ours[name], theirs[name]
    assert ours == theirs
    # What load balancers and dashboards of the field scrape.
    for name in ("num_requests_waiting", "kv_cache_usage_perc", "time_to_first_token_seconds_count"):
        assert name in theirs
