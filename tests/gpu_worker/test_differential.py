"""The engine against the naive one, over random schedules: the same tokens, reasons and log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_worker.engine.sequence import Request
from tests.fakes_model import HashModel
from tests.gpu_worker.naive_engine import complete, prompt_logprobs
from tests.gpu_worker.schedules import MAX_LEN, Run, random_engine, random_params, random_prompt

# Completion 0 is preempted before its sibling copies the last block of their prompt.
SIBLING_AFTER_PREEMPTION = 1010
NUM_SCHEDULES = 160  # as many as fit a test run; `python -m tests.bench.soak_engine` plays thousands


def play_schedule(seed: int, *, overlap: bool) -> int:
    """Returns how many completions were compared."""
    rng = np.random.default_rng(seed)
    model = HashModel()
    run = Run(random_engine(rng, model, overlap=overlap))
    requests = [
        Request(str(i), random_prompt(rng), random_params(rng), priority=int(rng.integers(-1, 2)))
        for i in range(int(rng.integers(1, 9)))
    ]
    arrivals = rng.integers(0, 13, len(requests)).tolist()
    aborts = {str(i): int(rng.integers(20)) for i in range(len(requests)) if rng.random() < 0.15}
    run.play(requests, arrivals, aborts)
    assert max(model.num_forward_tokens, default=0) <= run.engine.config.scheduler.max_num_batched_tokens
    return sum(check(request, run, is_aborted=request.request_id in aborts) for request in requests)


def check(request: Request, run: Run, *, is_aborted: bool) -> int:
    prompt, params = list(request.prompt_token_ids), request.params
    for index in range(params.n):
        output = run.outputs.get((request.request_id, index))
        if output is None:
            assert is_aborted  # before it came
            return 0
        expected = complete(prompt, params, index, MAX_LEN)
        if output.finish_reason == "aborted":
            assert is_aborted
            assert output.token_ids == expected.token_ids[: len(output.token_ids)]
            continue
        assert (output.token_ids, output.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert output.num_completion_tokens == len(output.token_ids)
        if params.logprobs is not None:
            sampled = [one.sampled.logprob for one in output.logprobs]
            assert sampled == pytest.approx(expected.logprobs, abs=1e-4)
        if params.prompt_logprobs is not None and index == 0 and len(prompt) > 1:
            scores = [one.sampled.logprob for one in output.prompt_logprobs]
            assert scores == pytest.approx(prompt_logprobs(prompt), abs=1e-4)
    return params.n


@pytest.mark.parametrize("part", range(4))
def test_every_schedule_gives_what_the_naive_engine_gives(part):
    seeds = range(part, NUM_SCHEDULES, 4)
    compared = sum(play_schedule(seed, overlap=seed // 4 % 2 == 1) for seed in seeds)
    assert compared > NUM_SCHEDULES // 4  # most are not aborted


@pytest.mark.parametrize("overlap", [False, True])
def test_a_sibling_of_a_preempted_completion_does_not_copy_what_is_not_there(overlap):
    assert play_schedule(SIBLING_AFTER_PREEMPTION, overlap=overlap) > 0
