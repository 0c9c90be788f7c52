"""Structured output: whatever the model wants to say, the text has the wanted form."""

from __future__ import annotations

import dataclasses
import json
import re
import string
import threading

import numpy as np
import pytest

from gpu_worker.engine.engine import Engine
from gpu_worker.engine.errors import RequestError
from gpu_worker.engine.llguidance_grammars import LlguidanceGrammars, TokenTexts
from gpu_worker.engine.sequence import Request, StepOutput
from gpu_worker.sampling_params import SamplingParams, StructuredOutput
from tests.fakes_model import EOS, VOCAB_SIZE, HashModel, make_engine

CHARACTERS = '{}[]":, \n-' + string.digits + string.ascii_letters  # the model never says the last one
TEXTS = TokenTexts([b"", b"</s>", *(c.encode() for c in CHARACTERS)][:VOCAB_SIZE], frozenset({0, EOS}))
SCHEMA = {
    "type": "object",
    "properties": {
        "size": {"enum": ["s", "m"]},
        "counts": {"type": "array", "maxItems": 3, "items": {"enum": [1, 22]}},
    },
    "required": ["size", "counts"],
    "additionalProperties": False,
}
FREE = SamplingParams(max_tokens=24, ignore_eos=True)
PARAMS = SamplingParams(temperature=1.0, seed=0, max_tokens=None)


@pytest.fixture(scope="module")
def grammars() -> LlguidanceGrammars:
    return LlguidanceGrammars(lambda: TEXTS, VOCAB_SIZE, (EOS,))


def text_of(output: StepOutput) -> str:
    return b"".join(TEXTS.token_bytes[i] for i in output.token_ids if i != EOS).decode()


def run(engine: Engine) -> dict[tuple[str, int], StepOutput]:
    outputs: dict[tuple[str, int], StepOutput] = {}
    while engine.has_work:
        for output in engine.step():
            seen = outputs.setdefault((output.request_id, output.index), output)
            if seen is not output:
                seen.merge(output)
    engine.check_integrity()
    return outputs


def is_of_schema(text: str) -> bool:
    value = json.loads(text)
    return value["size"] in ("s", "m") and set(value["counts"]) <= {1, 22} and len(value) == 2


FORMS = {
    "json_schema": (StructuredOutput(json_schema=SCHEMA), is_of_schema),
    "regex": (StructuredOutput(regex=r"^[a-f]{2,4}-[0-9]{3}$"), re.compile("[a-f]{2,4}-[0-9]{3}").fullmatch),
    "choice": (StructuredOutput(choice=["yes", "yesterday", "no"]), {"yes", "yesterday", "no"}.__contains__),
    "lark": (StructuredOutput(grammar='start: "a"~3 tail\ntail: "x" | "y"'), {"aaax", "aaay"}.__contains__),
    "gbnf": (StructuredOutput(grammar='root ::= "b" [0-9] "c"'), re.compile("b[0-9]c").fullmatch),
}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_texts_have_the_wanted_form_in_any_schedule(grammars, form, overlap):
    wanted, is_right = FORMS[form]
    params = dataclasses.replace(PARAMS, structured_output=wanted, n=2)
    engine = make_engine(grammars=grammars, num_blocks=26, max_num_seqs=6, max_model_len=160, overlap=overlap)
    for i in range(8):
        engine.add(Request(f"free {i}", [i + 2] * 9, dataclasses.replace(FREE, seed=i)))
        engine.add(Request(f"{i}", [i + 2] * 5, dataclasses.replace(params, seed=i)))
    outputs = run(engine)
    texts = {text_of(outputs[str(i), index]) for i in range(8) for index in range(2)}
    assert len(texts) > 1
    assert all(is_right(text) for text in texts)
    assert {outputs[str(i), 0].finish_reason for i in range(8)} == {"stop"}
    assert engine.stats().num_preemptions_total > 0


def test_any_object(grammars):
    wanted = StructuredOutput(json_object=True)
    params = dataclasses.replace(PARAMS, structured_output=wanted, max_tokens=120)
    engine = make_engine(grammars=grammars, max_model_len=160)
    for seed in range(6):
        engine.add(Request(str(seed), [2, 3], dataclasses.replace(params, seed=seed, logit_bias={3: 3.0})))
    ended = [output for output in run(engine).values() if output.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(text_of(output)), dict) for output in ended)


def test_a_text_ends_where_nothing_can_follow(grammars):
    params = dataclasses.replace(PARAMS, structured_output=StructuredOutput(choice=["no"]), ignore_eos=True)
    engine = make_engine(grammars=grammars)
    engine.add(Request("r", [2], params))
    output = run(engine)["r", 0]
    assert (text_of(output), output.finish_reason, output.stop_token_id) == ("no", "stop", None)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"json_schema": "{"}, "cannot be read: EOF while parsing"),
        ({"json_schema": {"type": "objekt"}}, "cannot be followed: Invalid type: objekt"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"regex": "[a-"}, "unclosed character class"),
        ({"grammar": "start: nowhere"}, 'unknown name: "nowhere"'),
        ({"grammar": "no grammar at all"}, "cannot be read: Failed to convert"),
    ],
)
def test_forms_that_cannot_be_followed_are_refused_with_the_reason(grammars, wanted, words):
    engine = make_engine(grammars=grammars)
    params = dataclasses.replace(PARAMS, structured_output=StructuredOutput(**wanted))
    with pytest.raises(RequestError, match=r"^structured_output ") as caught:
        engine.add(Request("r", [2], params))
    assert words in str(caught.value)
    assert not engine.has_work


def test_without_a_tokenizer_it_is_refused():
    params = dataclasses.replace(PARAMS, structured_output=StructuredOutput(json_object=True))
    with pytest.raises(RequestError, match="structured_output needs the model's tokenizer"):
        make_engine().add(Request("r", [2], params))


def test_contradictory_wishes_fail_alone(grammars):
    engine = make_engine(grammars=grammars)
    params = dataclasses.replace(PARAMS, structured_output=StructuredOutput(choice=["yes"]))
    engine.add(Request("bad", [2], dataclasses.replace(params, allowed_token_ids=(5,))))
    engine.add(Request("good", [2], params))
    outputs = run(engine)
    assert outputs["bad", 0].finish_reason == "error"
    assert "everything was forbidden" in outputs["bad", 0].error
    assert text_of(outputs["good", 0]) == "yes"


class AnyText:
    """A constraint that allows everything."""

    is_complete = False
    error = None

    def advance(self, token_id: int) -> bool:
        return True


class SlowGrammars:
    """Its masks are ready when the model is under way, and not before."""

    def __init__(self, model_runs: threading.Event) -> None:
        self.model_runs = model_runs

    def compile(self, wanted: StructuredOutput) -> AnyText:
        return AnyText()

    def fill(self, constraints: list[AnyText], masks_XW: np.ndarray) -> None:
        assert self.model_runs.wait(10), "the masks are made before the model runs"
        masks_XW[:] = -1


def test_masks_are_made_while_the_model_runs():
    model_runs = threading.Event()

    class Model(HashModel):
        def forward(self, *args):
            model_runs.set()
            return super().forward(*args)

    engine = make_engine(model=Model(), grammars=SlowGrammars(model_runs))
    params = dataclasses.replace(PARAMS, structured_output=StructuredOutput(choice=["a"]), max_tokens=4)
    engine.add(Request("r", [2], params))
    assert len(run(engine)["r", 0].token_ids) > 0
