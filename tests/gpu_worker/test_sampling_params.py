"""SamplingParams: limits, each named with its value; what counts as greedy."""

from __future__ import annotations

import math

import pytest

from gpu_worker.sampling_params import SamplingParams, SamplingParamsError


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("temperature", -0.1, "between 0.0 and 2.0"),
        ("temperature", math.nan, "between 0.0 and 2.0"),
        ("top_p", 1.1, "between 0.0 and 1.0"),
        ("min_p", -1, "between 0.0 and 1.0"),
        ("top_k", -2, "at least 0"),
        ("presence_penalty", 2.5, "between -2.0 and 2.0"),
        ("frequency_penalty", math.inf, "between -2.0 and 2.0"),
        ("repetition_penalty", 0.0, "greater than 0"),
        ("max_tokens", 0, "at least 1"),
        ("min_tokens", -1, "at least 0"),
        ("n", 0, "between 1 and 128"),
        ("logprobs", 21, "between 0 and 20"),
    ],
)
def test_values_out_of_range_are_named(name, value, limits):
    with pytest.raises(SamplingParamsError, match=f"{name} must be {limits}") as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", "hot", "temperature must be a number, got 'hot'"),
        ("top_p", None, "top_p must be a number, got None"),
        ("max_tokens", 1.5, "max_tokens must be an integer, got 1.5"),
        ("n", None, "n must be an integer, got None"),
        ("seed", "7", "seed must be an integer, got '7'"),
    ],
)
def test_values_of_another_type_are_named(name, value, message):
    with pytest.raises(SamplingParamsError) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value) == message


def test_min_tokens_is_at_most_max_tokens():
    with pytest.raises(SamplingParamsError, match="min_tokens must be between 0 and 4, got 5"):
        SamplingParams(max_tokens=4, min_tokens=5)


def test_a_bias_is_limited():
    with pytest.raises(SamplingParamsError, match="logit_bias of token 7 must be between -100 and 100"):
        SamplingParams(logit_bias={7: 101.0})


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}])
def test_greedy(params):
    assert SamplingParams(**params).is_greedy
    assert not SamplingParams().is_greedy


def test_what_a_caller_writes_is_normalised():
    params = SamplingParams(stop="end", stop_token_ids=[1, 2], logit_bias=None)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("end",), (1, 2), {})
    assert SamplingParams(top_k=-1) == SamplingParams()
