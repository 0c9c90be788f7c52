"""Engine: a completion is what its prompt determines, whatever else runs, and nothing is left behind."""

from __future__ import annotations

import dataclasses

import pytest

from gpu_worker.engine.engine import Engine
from gpu_worker.engine.errors import ContextLengthError, RequestError
from gpu_worker.engine.sequence import Request, StepOutput
from gpu_worker.sampling_params import SamplingParams
from tests.fakes_model import POISON, VOCAB_SIZE, HashModel, make_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def request(name: str, prompt: list[int], params: SamplingParams = GREEDY, **more: object) -> Request:
    return Request(name, prompt, params, **more)  # type: ignore[arg-type]


def run(engine: Engine) -> dict[tuple[str, int], StepOutput]:
    """Steps until nothing is left; each sequence's outputs merged."""
    merged: dict[tuple[str, int], StepOutput] = {}
    while engine.has_work:
        for output in engine.step():
            key = (output.request_id, output.index)
            if key in merged:
                merged[key].merge(output)
            else:
                merged[key] = output
        engine.check_integrity()
    assert engine.stats().num_used_blocks == 0
    return merged


def alone(prompt: list[int], params: SamplingParams) -> list[list[int]]:
    """The `n` completions of a prompt with an engine to itself."""
    engine = make_engine(max_num_seqs=1, max_num_batched_tokens=64, enable_prefix_caching=False)
    engine.add(request("alone", prompt, params))
    return [output.token_ids for _, output in sorted(run(engine).items())]


def test_an_equal_prefix_is_computed_once():
    model = HashModel()
    engine = make_engine(model=model)
    prompt = [2, 3] * 8
    engine.add(request("first", prompt))
    first = run(engine)["first", 0]
    computed = sum(model.num_forward_tokens)
    engine.add(request("second", prompt))
    second = run(engine)["second", 0]
    assert second.token_ids == first.token_ids
    assert (first.num_cached_tokens, second.num_cached_tokens) == (
        0,
        12,
    )  # the last block holds the token to sample from
    assert sum(model.num_forward_tokens) == computed + computed - 12


def test_prefixes_are_not_shared_across_salts_nor_when_turned_off():
    engine = make_engine()
    for name, salt in (("a", ""), ("b", "salt")):
        engine.add(request(name, [2] * 16, cache_salt=salt))
        assert run(engine)[name, 0].num_cached_tokens == 0
    engine = make_engine(enable_prefix_caching=False)
    for name in "ab":
        engine.add(request(name, [2] * 16))
        assert run(engine)[name, 0].num_cached_tokens == 0


@pytest.mark.parametrize("caching", [True, False])
def test_n_completions_share_the_prompt(caching):
    model = HashModel()
    engine = make_engine(model=model, enable_prefix_caching=caching)
    engine.add(
        request("r", [2, 3] * 8, dataclasses.replace(GREEDY, temperature=1.0, n=4, seed=1, max_tokens=2))
    )
    outputs = run(engine)
    assert len({tuple(output.token_ids) for output in outputs.values()}) > 1
    assert sum(model.num_forward_tokens) == 16 + 1 + 3 * (1 + 1)  # the last prompt token, and the next


def test_preemption_changes_nothing_but_the_work_done():
    engine = make_engine(num_blocks=10)
    names = [str(i) for i in range(6)]
    params = dataclasses.replace(GREEDY, max_tokens=24)
    for i, name in enumerate(names):
        engine.add(request(name, [2 + i] * 9, params))
    outputs = run(engine)
    assert engine.stats().num_preemptions_total > 0
    for i, name in enumerate(names):
        assert outputs[name, 0].token_ids == alone([2 + i] * 9, params)[0]


def test_a_flood_of_urgent_requests_does_not_starve_the_others():
    engine = make_engine(max_num_seqs=1)
    engine.add(request("patient", [5], priority=1, arrival_time=0.0))
    finished = []
    for second in range(100):
        engine.add(request(f"urgent {second}", [6], arrival_time=float(second)))
        for _ in range(8):
            finished += [output.request_id for output in engine.step() if output.finish_reason]
        if "patient" in finished:
            break
    assert finished.index("patient") == 30  # a priority step is worth 30 seconds


@pytest.mark.parametrize("after_steps", [0, 1, 3])
def test_an_abort_frees_blocks_at_once(after_steps):
    engine = make_engine(max_num_batched_tokens=8)
    engine.add(request("gone", [2] * 20, dataclasses.replace(GREEDY, n=2)))
    for _ in range(after_steps):
        engine.step()
    assert engine.abort("gone")
    assert engine.stats().num_used_blocks == 0
    engine.check_integrity()
    last = engine.step()
    assert [output.finish_reason for output in last] == ["aborted", "aborted"]
    assert not engine.has_work
    assert not engine.abort("gone")


def test_a_deadline_ends_a_request_and_only_that_one():
    now = [0.0]
    engine = make_engine(max_num_seqs=1)
    engine._clock = lambda: now[0]
    engine.add(request("running", [2], deadline=5.0))
    engine.add(request("waiting", [2], deadline=5.0))
    engine.add(request("unhurried", [2]))
    engine.step()
    now[0] = 5.0
    outputs = run(engine)
    assert {key[0]: output.finish_reason for key, output in outputs.items()} == {
        "running": "aborted",
        "waiting": "aborted",
        "unhurried": "length",
    }
    assert outputs["waiting", 0].error == "the deadline passed"


def test_a_poisoned_request_fails_alone_and_leaves_no_trace():
    engine = make_engine()
    engine.add(request("good", [2] * 12))
    engine.add(request("bad", [2] * 8 + [POISON] * 4, dataclasses.replace(GREEDY, n=2)))
    outputs = run(engine)
    assert outputs["good", 0].token_ids == alone([2] * 12, GREEDY)[0]
    assert outputs["bad", 0].finish_reason == outputs["bad", 1].finish_reason == "error"
    assert "NaN" in outputs["bad", 0].error
    assert outputs["bad", 0].token_ids == []
    engine.add(request("again", [2] * 8 + [POISON] * 8))
    assert run(engine)["again", 0].num_cached_tokens == 8


def test_finish_reasons():
    engine = make_engine()
    stop = alone([4], GREEDY)[0][2]
    engine.add(request("stop", [4], dataclasses.replace(GREEDY, stop_token_ids=(stop,))))
    engine.add(request("length", [4]))
    engine.add(request("context", [4] * 60, dataclasses.replace(GREEDY, max_tokens=None)))
    outputs = {key[0]: output for key, output in run(engine).items()}
    assert (outputs["stop"].finish_reason, outputs["stop"].stop_token_id) == ("stop", stop)
    assert outputs["stop"].token_ids == alone([4], GREEDY)[0][:3]
    assert (outputs["length"].finish_reason, outputs["length"].num_completion_tokens) == ("length", 8)
    assert (outputs["context"].finish_reason, outputs["context"].num_completion_tokens) == ("length", 4)
    timings = outputs["length"].timings
    assert timings is not None
    assert min(dataclasses.astuple(timings)) >= 0


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([], {}, RequestError, "prompt must hold at least one token"),
        (
            [3, VOCAB_SIZE],
            {},
            RequestError,
            "prompt has token id 61 at position 1; the vocabulary has ids 0 to 60",
        ),
        ([3], {"stop_token_ids": (99,)}, RequestError, "stop_token_ids has token id 99 at position 0"),
        ([3], {"logit_bias": {-1: 1.0}}, RequestError, "logit_bias has token id -1"),
        (
            [3] * 60,
            {"max_tokens": 5},
            ContextLengthError,
            "60 tokens and max_tokens 5, 65 in all; the model's context has 64",
        ),
        (
            [3] * 64,
            {"max_tokens": None},
            ContextLengthError,
            "64 tokens and room for a completion, 65 in all",
        ),
        (
            [3] * 40,
            {"max_tokens": 9},
            ContextLengthError,
            "49 in all; the KV cache has 48 (12 blocks of 4 tokens)",
        ),
    ],
)
def test_what_can_never_run_is_refused_with_numbers(prompt, params, error, message):
    engine = make_engine(num_blocks=12)
    with pytest.raises(error) as caught:
        engine.add(request("r", prompt, SamplingParams(**params)))
    assert message in str(caught.value)
    assert not engine.has_work


def test_a_request_id_in_use_is_refused_until_it_ends():
    engine = make_engine()
    engine.add(request("r", [2]))
    with pytest.raises(RequestError, match="in use"):
        engine.add(request("r", [3]))
    run(engine)
    engine.add(request("r", [3]))
    run(engine)


def test_prompts_that_come_together_share_what_they_have_in_common():
    model = HashModel()
    engine = make_engine(model=model, max_num_batched_tokens=64)
    for name in "abc":
        engine.add(request(name, [2, 3] * 8, dataclasses.replace(GREEDY, max_tokens=1)))
    outputs = run(engine)
    assert model.num_forward_tokens == [16 + 2 * 4]  # the last block holds the token to sample from
    assert len({tuple(output.token_ids) for output in outputs.values()}) == 1


def test_the_blocks_of_a_poisoned_request_are_wiped():
    """Whoever is given them next would meet its NaN in the slots that it has not yet written."""
    engine = make_engine()
    engine.add(Request("a", [2, 3, POISON], SamplingParams(max_tokens=2)))
    engine.step()
    keys, _ = engine._kv_cache.layers[0]
    assert not keys.any()
