"""With overlap the device is given the next step before anybody has read the last one's tokens."""

from __future__ import annotations

import pytest

from gpu_worker.engine.sampler import Sampler
from gpu_worker.engine.sequence import Request
from gpu_worker.layers.batch import Batch
from gpu_worker.sampling_params import SamplingParams
from tests.fakes_model import EOS, POISON, HashModel, make_engine
from tests.gpu_worker.naive_engine import complete

GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)


class Device(HashModel):
    """Notes what it is given, and when somebody waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.events: list[str] = []
        self.sizes: list[int] = []
        read = Sampler.read

        def noted(sampler, drawn):
            self.events.append("wait")
            return read(sampler, drawn)

        monkeypatch.setattr(Sampler, "read", noted)

    def forward(self, batch: Batch, kv_cache):
        self.events.append("launch")
        self.sizes.append(batch.num_tokens)
        return super().forward(batch, kv_cache)


def run(engine, *requests: Request) -> dict[str, list[int]]:
    given: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            given[output.request_id] += output.token_ids
        engine.check_integrity()
    return given


def test_launches_are_one_step_ahead_of_waits(monkeypatch):
    device = Device(monkeypatch)
    engine = make_engine(model=device, overlap=True)
    given = run(engine, Request("a", [2, 3, 4], GREEDY))
    assert given["a"] == complete([2, 3, 4], GREEDY, 0, 64).token_ids
    # A limit is foreseen: no tenth launch.
    assert device.events == ["launch", *["launch", "wait"] * 8, "wait"]


def test_what_follows_a_stop_is_computed_once_and_dropped(monkeypatch):
    stop = complete([2, 3, 4], GREEDY, 0, 64).token_ids[4]
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, stop_token_ids=(stop,))
    device = Device(monkeypatch)
    engine = make_engine(model=device, overlap=True)
    given = run(engine, Request("a", [2, 3, 4], params), Request("b", [9], GREEDY))
    assert given["a"][-1] == stop
    assert len(given["a"]) <= 5
    assert given["b"] == complete([9], GREEDY, 0, 64).token_ids
    assert device.sizes == [4, *[2] * len(given["a"]), *[1] * (8 - len(given["a"]))]


def test_bad_words_need_the_last_token_and_wait_for_it(monkeypatch):
    params = SamplingParams(temperature=0.0, max_tokens=4, bad_words_token_ids=((5, EOS),), ignore_eos=True)
    device = Device(monkeypatch)
    given = run(make_engine(model=device, overlap=True), Request("a", [2, 3], params))
    assert given["a"] == complete([2, 3], params, 0, 64).token_ids
    assert device.events == ["launch", "wait"] * 4


def test_an_aborted_request_leaves_nothing_behind(monkeypatch):
    device = Device(monkeypatch)
    engine = make_engine(model=device, overlap=True)
    engine.add(Request("a", [2, 3], GREEDY))
    engine.step()
    engine.step()
    assert engine.abort("a")
    (last,) = engine.take_outputs()
    assert (last.finish_reason, last.num_completion_tokens) == ("aborted", 1)
    assert engine.stats().num_used_blocks == 0
    given = run(engine, Request("b", [4, 4, 4], GREEDY))
    assert given["b"] == complete([4, 4, 4], GREEDY, 0, 64).token_ids


def test_seeds_penalties_and_logprobs_are_those_of_no_overlap():
    params = SamplingParams(seed=3, max_tokens=9, ignore_eos=True, frequency_penalty=1.5, logprobs=2, n=2)
    told = []
    for overlap in (False, True):
        engine, outputs = make_engine(overlap=overlap), []
        engine.add(Request("a", [2, 3, 4], params))
        engine.add(Request("b", [5], SamplingParams(seed=9, max_tokens=20, top_p=0.7)))
        while engine.has_work:
            outputs += [(o.request_id, o.index, o.token_ids, o.logprobs) for o in engine.step()]
        told.append(sorted(outputs, key=lambda output: output[:2]))
    assert told[0] == told[1]


def test_a_poisoned_request_fails_alone_though_its_next_step_is_under_way(monkeypatch):
    device = Device(monkeypatch)
    engine = make_engine(model=device, overlap=True)
    engine.add(Request("bad", [2, 3, POISON], GREEDY))
    engine.add(Request("good", [9], GREEDY))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.check_integrity()
    assert device.sizes[1] == 2  # the second step was launched for both
    (bad,) = [output for output in outputs if output.request_id == "bad"]
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert "NaN" in bad.error
    good = [token for output in outputs if output.request_id == "good" for token in output.token_ids]
    assert good == complete([9], GREEDY, 0, 64).token_ids
    assert engine.stats().num_used_blocks == 0
