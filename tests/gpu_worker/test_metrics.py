"""The published numbers are the engine's, under the names that dashboards know."""

from __future__ import annotations

import dataclasses
import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gpu_worker.engine.sequence import Request
from gpu_worker.metrics import PREFIX, VLLM_PREFIX, EngineCollector, EngineFacts, RequestMetrics
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


def test_steps_silence_and_experts_are_told(registry):
    engine = make_engine()
    about = EngineFacts(
        silence_ms=lambda: 1500,
        expert_tokens=lambda: {1: [3, 4], 2: [5, 6]},
        cache_config={"block_size": "4", "num_gpu_blocks": "64"},
    )
    registry.register(EngineCollector(engine.stats, "m", (PREFIX, VLLM_PREFIX), about))
    run(engine, RequestMetrics(registry, "m"), [5, 6, 7])
    text = generate_latest(registry).decode()
    assert 'wint2:iteration_tokens_total_bucket{le="1",model_name="m"} 7.0' in text
    assert 'wint2:iteration_tokens_total_bucket{le="8",model_name="m"} 8.0' in text
    assert 'wint2:iteration_tokens_total_sum{model_name="m"} 10.0' in text
    assert 'wint2:engine_silence_seconds{model_name="m"} 1.5' in text
    assert 'wint2:expert_tokens_total{expert="1",layer="2",model_name="m"} 6.0' in text
    assert 'vllm:cache_config_info{block_size="4",model_name="m",num_gpu_blocks="64"} 1.0' in text


def test_a_request_of_several_completions_is_one_request(registry):
    engine, metrics = make_engine(), RequestMetrics(registry, "m")
    request = Request("r", [5, 6], dataclasses.replace(GREEDY, n=3), arrival_time=time.monotonic())
    observer = metrics.start(request)
    engine.add(request)
    while engine.has_work:
        for output in engine.step():
            observer.add(output)
    values, _ = published(registry)
    assert values["wint2:request_success_total"] == values["wint2:time_to_first_token_seconds_count"] == 1
    assert values["wint2:request_generation_tokens_sum"] == 24
    assert values["wint2:request_params_n_sum"] == 3
    assert values["wint2:request_max_num_generation_tokens_sum"] == 8
    assert values["wint2:inter_token_latency_seconds_count"] == 21


# What vLLM's dashboards and the field's load balancers ask for, by the name of one sample of each.
VLLM_SAMPLES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "gpu_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "request_prompt_tokens_sum",
    "request_generation_tokens_sum",
    "iteration_tokens_total_count",
    "request_max_num_generation_tokens_sum",
    "request_params_n_sum",
    "request_params_max_tokens_sum",
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_count",
    "request_time_per_output_token_seconds_count",
    "time_per_output_token_seconds_count",
    "e2e_request_latency_seconds_count",
    "request_queue_time_seconds_count",
    "request_inference_time_seconds_count",
    "request_prefill_time_seconds_count",
    "request_decode_time_seconds_count",
    "cache_config_info",
    "kv_block_lifetime_seconds_count",
    "kv_block_idle_before_evict_seconds_count",
    "kv_block_reuse_gap_seconds_count",
]


def test_every_name_of_vllm_moves(registry):
    engine, prefixes = make_engine(num_blocks=12, max_num_seqs=4), (PREFIX, VLLM_PREFIX)
    metrics = RequestMetrics(registry, "m", prefixes)
    registry.register(EngineCollector(engine.stats, "m", prefixes, EngineFacts(cache_config={"a": "b"})))
    seen: dict[str, set[float]] = {}

    def look():
        for name, value in published(registry)[0].items():
            seen.setdefault(name, set()).add(value)

    look()
    observers = {}
    for i in range(9):
        params = dataclasses.replace(GREEDY, max_tokens=16)
        request = Request(str(i), [2 + i % 3] * 9, params, arrival_time=time.monotonic())
        engine.add(request)
        observers[request.request_id] = metrics.start(request)
    while engine.has_work:
        for output in engine.step():
            observers[output.request_id].add(output)
        look()
    for prefix in prefixes:
        stuck = {name for name in VLLM_SAMPLES if len(seen.get(prefix + name, ())) < 2}
        # No value before the first request has ended, and one ever after.
        assert stuck <= {"cache_config_info", "request_success_total"}, stuck
        assert seen[f"{prefix}cache_config_info"] == {1.0}
        assert max(seen[f"{prefix}request_success_total"]) == 9
