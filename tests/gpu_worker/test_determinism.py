"""A greedy completion in float32 on the CPU has the same tokens in any company and under any schedule."""

from __future__ import annotations

import dataclasses
from itertools import islice

import numpy as np
import pytest
import torch

from cuda_kernels.compiled import has_integer_kernels
from gpu_worker.config import CacheConfig, EngineConfig, SchedulerConfig
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.sequence import Request
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.cpu_layers import with_compiled_layers
from gpu_worker.model.loader import load_model
from gpu_worker.sampling_params import SamplingParams
from tests.tiny import make_tiny_model

NUM_OTHERS = 63
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=3)
PREFIX = list(range(40, 75))
BLOCK_SIZE = 8


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """By name: full precision, WINT2 with WINT4 and WINT8, and those as integers in one compiled call."""
    folder = tmp_path_factory.mktemp("tiny")
    paths = {
        "float": make_tiny_model(folder / "float", quantized=False),
        "wint2": make_tiny_model(folder / "wint2", quantized=True),
    }
    loaded = {name: load(path) for name, path in paths.items()}
    wide = make_tiny_model(folder / "wide", quantized=True, head_dim=64)
    loaded["integers"] = with_compiled_layers(load(wide, "int8" if has_integer_kernels() else "float32"))
    return loaded


def load(path, activations="float32"):
    config, cpu = read_model_config(path), torch.device("cpu")
    return load_model(config, device=cpu, dtype=torch.float32, activations=activations)


def make_engine(
    decoder, *, num_blocks=1024, budget=4096, caching=True, chunked=True, overlap=False, dtype=torch.float32
):
    config = EngineConfig(
        decoder.config,
        CacheConfig(BLOCK_SIZE, num_blocks, caching, dtype),
        SchedulerConfig(64, budget, 128, chunked),
        torch.device("cpu"),
        torch.float32,
        overlap=overlap,
    )
    shape = decoder.config
    sizes = (shape.num_hidden_layers, num_blocks, BLOCK_SIZE, shape.num_key_value_heads, shape.head_dim)
    return Engine(config, decoder, KVCache(*sizes, dtype, torch.device("cpu")))


def targets():
    """Prompts of one token, of many, of whole blocks, and two with a common beginning."""
    return [[5], PREFIX, PREFIX[:32], [*PREFIX, 9, 8, 7]]


def others():
    rng = np.random.default_rng(0)
    for i in range(NUM_OTHERS - len(targets()) + 1):
        prompt = [*PREFIX[: int(rng.integers(36))], *rng.integers(3, 200, int(rng.integers(1, 30))).tolist()]
        yield prompt, SamplingParams(temperature=1.0, seed=i, max_tokens=int(rng.integers(1, 40)))


def complete(engine, requests):
    """{request id: (token ids, log-probabilities)}"""
    return {name: what for (name, _), what in complete_each(engine, requests).items()}


def complete_each(engine, requests):
    """{(request id, index): (token ids, log-probabilities)}"""
    given = {}
    for name, (prompt, params) in requests.items():
        engine.add(Request(name, prompt, params))
    while engine.has_work:
        for output in engine.step():
            token_ids, logprobs = given.setdefault((output.request_id, output.index), ([], []))
            token_ids += output.token_ids
            logprobs += [one.sampled.logprob for one in output.logprobs or ()]
    engine.check_integrity()
    return given


@pytest.fixture(scope="module")
def alone(decoders):
    return {
        name: [
            complete(make_engine(decoder, caching=False), {"r": (prompt, GREEDY)})["r"]
            for prompt in targets()
        ]
        for name, decoder in decoders.items()
    }


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        pytest.param("float", {}, id="together"),
        pytest.param("float", {"caching": False}, id="no prefix cache"),
        pytest.param("float", {"budget": 96}, id="small chunks"),
        pytest.param("float", {"chunked": False}, id="whole prompts"),
        pytest.param("float", {"num_blocks": 64, "budget": 96}, id="preempted"),
        pytest.param("wint2", {"num_blocks": 64, "budget": 96, "overlap": True}, id="overlap, WINT2"),
        pytest.param("integers", {"num_blocks": 64, "budget": 96}, id="preempted, integers"),
    ],
)
def test_a_batch_of_64_changes_no_bit(decoders, alone, name, limits):
    engine = make_engine(decoders[name], **limits)
    requests = {f"other {i}": request for i, request in enumerate(others())}
    # The latest come last in order, and are what is preempted.
    requests |= {str(i): (prompt, GREEDY) for i, prompt in enumerate(targets())}
    given = complete(engine, requests)
    assert [given[str(i)] for i in range(len(targets()))] == alone[name]
    assert (engine.stats().num_preemptions_total > 0) == ("num_blocks" in limits)
    assert (engine.stats().num_prefix_hit_tokens_total > 0) == ("caching" not in limits)


def test_a_seed_gives_one_text_in_any_company(decoders):
    params = dataclasses.replace(GREEDY, temperature=0.9, top_p=0.95, seed=11)
    single = complete(make_engine(decoders["float"]), {"r": (PREFIX, params)})["r"]
    company = {f"other {i}": request for i, request in enumerate(others())} | {"r": (PREFIX, params)}
    assert complete(make_engine(decoders["float"], num_blocks=64, budget=96), company)["r"] == single


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_narrow_cache_shares_preempts_and_copies_as_float32_does(decoders, dtype):
    """Bit for bit; `n` = 2 copies the prompt's last block."""
    decoder, pair = decoders["float"], dataclasses.replace(GREEDY, n=2)
    single = [
        complete(make_engine(decoder, caching=False, dtype=dtype), {"r": (prompt, GREEDY)})["r"]
        for prompt in targets()
    ]
    requests = {f"other {i}": request for i, request in enumerate(islice(others(), 16))}
    requests |= {str(i): (prompt, pair) for i, prompt in enumerate(targets())}
    engine = make_engine(decoder, num_blocks=32, budget=96, dtype=dtype)
    given = complete_each(engine, requests)
    assert [given[str(i), n] for i in range(len(targets())) for n in (0, 1)] == [
        one for one in single for _ in (0, 1)
    ]
    assert engine.stats().num_preemptions_total > 0 < engine.stats().num_prefix_hit_tokens_total
