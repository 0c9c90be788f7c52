"""PromptGraphs, with a fake graph: padding changes no completion, and short prompts are replayed."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.engine.engine import Engine
from gpu_worker.engine.prompt_graphs import TOKEN_SIZES, PromptGraphs
from gpu_worker.engine.sequence import Request
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.sampling_params import SamplingParams
from tests.fakes_model import HashModel, engine_config

MAX_BLOCKS = 40


def fake_capture(function):
    function()
    return function


def make_engine(limit: int) -> tuple[Engine, HashModel]:
    """An engine whose graphs hold at most `limit` tokens; none of them without a limit."""
    config = engine_config(num_blocks=200, max_num_seqs=20, max_num_batched_tokens=64)
    model, cache = HashModel(), config.cache
    kv_cache = KVCache(1, cache.num_blocks + 1, cache.block_size, 1, 1, cache.dtype, config.device)
    graphs = PromptGraphs(model, kv_cache, MAX_BLOCKS, config.device)
    sizes = iter(TOKEN_SIZES)
    graphs.capture(fake_capture, lambda function: next(sizes) <= limit)
    model.num_forward_tokens.clear()
    return Engine(config, graphs, kv_cache), model


def completions(engine: Engine) -> dict[str, list[int]]:
    for i in range(13):
        params = SamplingParams(seed=i, max_tokens=3 + i, ignore_eos=True, temperature=i % 2)
        engine.add(Request(str(i), [2 + i] * (1 + 3 * i), params))
    result: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            result.setdefault(output.request_id, []).extend(output.token_ids)
        engine.check_integrity()
    return result


@pytest.mark.parametrize("limit", [16, 32, 96])
def test_no_completion_changes(limit: int):
    plain, _ = make_engine(0)
    graphed, model = make_engine(limit)
    assert completions(graphed) == completions(plain)
    sizes = set(model.num_forward_tokens)
    assert {16} <= sizes
    assert not {size for size in sizes if size <= limit} - set(TOKEN_SIZES)


def test_a_step_beyond_the_graphs_runs_by_itself():
    engine, model = make_engine(32)
    engine.add(Request("long", [5] * 50, SamplingParams(max_tokens=1)))
    engine.step()
    assert model.num_forward_tokens == [50]


def test_sizes_end_where_kernels_take_longer_and_where_the_context_does():
    config = engine_config()
    kv_cache = KVCache(1, 9, 4, 1, 1, torch.float32, config.device)
    calls: list[int] = []
    graphs = PromptGraphs(HashModel(), kv_cache, 10, config.device)
    graphs.capture(lambda function: calls.append(1) or function, lambda function: True)
    assert len(calls) == len([size for size in TOKEN_SIZES if size <= 40])
