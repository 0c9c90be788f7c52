"""With overlap the device is given the next step before anybody has read the last one's tokens."""

from __future__ import annotations

import pytest

from gpu_worker.engine.sampler import Sampler
from gpu_worker.engine.sequence import Request
from gpu_worker.layers.batch import Batch
from gpu_worker.sampling_params import SamplingParams
from tests.fakes_model import EOS, HashModel, make_engine
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
