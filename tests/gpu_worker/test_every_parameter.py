"""Each sampling parameter does something to a completion: through gRPC and through LLM, none is ignored."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from gpu_worker.engine.llguidance_grammars import LlguidanceGrammars
from gpu_worker.engine.sequence import Request, StepOutput
from gpu_worker.messages import WIRE_PARAM_NAMES, read_params, write_params
from gpu_worker.sampling_params import SamplingParams, StructuredOutput
from tests.fakes_model import EOS, VOCAB_SIZE, make_engine
from tests.gpu_worker.test_structure import TEXTS
from tests.tiny import make_tiny_model
from wint2 import LLM

PROMPT = [2, 3, 4]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
RANDOM: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, "seed": 1}


def complete(**wishes: Any) -> list[tuple[object, ...]]:
    """What the engine tells of each completion when the wishes come over the wire."""
    params = read_params(write_params(SamplingParams(**wishes)))
    grammars = LlguidanceGrammars(lambda: TEXTS, VOCAB_SIZE, (EOS,))
    engine = make_engine(grammars=grammars)
    engine.add(Request("r", PROMPT, params))
    merged: dict[int, StepOutput] = {}
    while engine.has_work:
        for output in engine.step():
            seen = merged.setdefault(output.index, output)
            if seen is not output:
                seen.merge(output)
    return [(o.token_ids, o.finish_reason, o.logprobs, o.prompt_logprobs) for _, o in sorted(merged.items())]


LIKELIEST = complete(**GREEDY)[0][0]
ENDING = {"temperature": 0.0, "max_tokens": 12, "logit_bias": {EOS: 100}}

# By name: what the rest of the request is, and the parameter's value.
EFFECTS: dict[str, tuple[dict[str, Any], Any]] = {
    "temperature": (RANDOM, 0.1),
    "top_p": (RANDOM, 0.2),
    "top_k": (RANDOM, 2),
    "min_p": (RANDOM, 0.9),
    "repetition_penalty": (GREEDY | {"logit_bias": {9: 3.0}}, 2.0),
    "presence_penalty": (GREEDY | {"logit_bias": {9: 3.0}}, 2.0),
    "frequency_penalty": (GREEDY | {"logit_bias": {9: 3.0}}, 2.0),
    "seed": (RANDOM, 2),
    "max_tokens": (GREEDY, 5),
    "min_tokens": (ENDING, 6),
    "ignore_eos": (ENDING, True),
    "stop_token_ids": (GREEDY, [LIKELIEST[3]]),
    "logit_bias": (GREEDY, {7: 100.0}),
    "bad_words_token_ids": (GREEDY, [LIKELIEST[2:4]]),
    "allowed_token_ids": (GREEDY, [5, 6, 7]),
    "logprobs": (GREEDY, 2),
    "prompt_logprobs": (GREEDY, 2),
    "structured_output": (GREEDY, StructuredOutput(regex="[0-9]{3}")),
    "n": (RANDOM, 3),
}


def test_every_parameter_is_here():
    # Of texts: what the detokenizer does, and what are token ids by the time they come here.
    texts = {"stop", "include_stop_str_in_output", "skip_special_tokens", "bad_words"}
    assert EFFECTS.keys() == {one.name for one in fields(SamplingParams)} - texts == set(WIRE_PARAM_NAMES)


@pytest.mark.parametrize("name", EFFECTS)
def test_it_changes_what_the_engine_gives(name):
    rest, value = EFFECTS[name]
    assert complete(**rest | {name: value}) != complete(**rest)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(make_tiny_model(tmp_path_factory.mktemp("tiny"), quantized=False), num_kv_blocks=64)


@pytest.mark.parametrize("name", sorted({*EFFECTS, "bad_words", "stop"} - {"bad_words_token_ids"}))
def test_it_changes_what_llm_gives(llm, name):
    (free,) = llm.generate("the thing", SamplingParams(**GREEDY), use_tqdm=False)
    own = {
        "stop_token_ids": (GREEDY, [free.outputs.token_ids[3]]),
        "bad_words": (GREEDY, [free.outputs.text[:2]]),
        "stop": (GREEDY, [free.outputs.text[2:4]]),
        "min_tokens": ({"temperature": 0.0, "max_tokens": 12, "logit_bias": {2: 100}}, 6),
        "ignore_eos": ({"temperature": 0.0, "max_tokens": 12, "logit_bias": {2: 100}}, True),
    }
    rest, value = own.get(name) or EFFECTS[name]
    with_it, without = (
        llm.generate("the thing", SamplingParams(**wishes), use_tqdm=False)[0]
        for wishes in (rest | {name: value}, rest)
    )
    assert told(with_it) != told(without)


def told(output: Any) -> object:
    completions = [(one.token_ids, one.text, one.finish_reason, one.logprobs) for one in output.outputs]
    return completions, output.prompt_logprobs
