"""Ten thousand short requests, many cancelled, aborted or late: all end, and no block stays behind."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from gpu_worker.engine.sequence import Request
from gpu_worker.sampling_params import SamplingParams
from tests.fakes_model import POISON, make_engine


@pytest.mark.parametrize(("num_requests", "overlap"), [(10_000, False), (3_000, True)])
def test_nothing_is_left_of_ten_thousand_requests(num_requests, overlap):
    rng = np.random.default_rng(0)
    engine = make_engine(num_blocks=80, max_num_seqs=256, max_num_batched_tokens=512, overlap=overlap)
    engine._clock = lambda: float(num_steps)
    endings: Counter[tuple[str, int]] = Counter()
    reasons: Counter[str | None] = Counter()
    num_steps = num_added = num_generated = 0
    while num_added < num_requests or engine.has_work:
        for _ in range(min(int(rng.integers(0, 120)), num_requests - num_added)):
            engine.add(random_request(rng, str(num_added), num_steps))
            num_added += 1
        for request_id in rng.integers(num_added, size=8).tolist() if num_added else ():
            engine.abort(str(request_id))
        for output in engine.step():
            num_generated += len(output.token_ids)
            if output.finish_reason is not None:
                endings[output.request_id, output.index] += 1
                reasons[output.finish_reason] += 1
        num_steps += 1
        if num_steps % 32 == 0:
            engine.check_integrity()
    engine.check_integrity()
    assert engine.stats().num_used_blocks == engine.stats().num_running == engine.stats().num_waiting == 0
    assert set(endings.values()) == {1}
    assert {int(request_id) for request_id, _ in endings} == set(range(num_requests))
    assert reasons.keys() == {"length", "stop", "aborted", "error"}
    assert engine.stats().num_preemptions_total > 0
    assert engine.stats().num_generation_tokens_total >= num_generated


def random_request(rng: np.random.Generator, request_id: str, now: int) -> Request:
    prompt = rng.integers(2, 9, int(rng.integers(1, 20))).tolist()
    if rng.random() < 0.01:
        prompt.append(POISON)
    params = SamplingParams(
        temperature=float(rng.integers(2)),
        max_tokens=int(rng.integers(1, 17)),
        n=2 if rng.random() < 0.05 else 1,
    )
    deadline = now + float(rng.integers(1, 40)) if rng.random() < 0.2 else None
    return Request(request_id, prompt, params, arrival_time=float(now), deadline=deadline)
