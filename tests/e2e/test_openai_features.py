"""What OpenAI's API promises beyond text, on the real engine: calls, forms, probabilities, choices."""

from __future__ import annotations

import json
import math
import re

import httpx
import openai
import pytest

HI = [{"role": "user", "content": "What is the weather?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"day": {"type": "string", "enum": ["today", "tomorrow"]}},
                "required": ["day"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "calendar")
]
NAMED = {"type": "function", "function": {"name": "calendar"}}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(("choice", "is_stream"), [("required", True), (NAMED, False)])
def test_a_call_that_must_be_made_is_made(client, choice, is_stream):
    answer = client.chat.completions.create(
        model="tiny", messages=HI, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, seed=1,
        max_tokens=200, stream=is_stream,
    )  # fmt: skip
    if is_stream:
        choices = [chunk.choices[0] for chunk in answer]
        head, *more = [call for choice in choices for call in choice.delta.tool_calls or []]
        assert {piece.index for piece in (head, *more)} == {0}
    else:
        choices = answer.choices
        head, *more = choices[0].message.tool_calls
        assert not more
    assert head.function.name in (("weather", "calendar") if choice == "required" else ("calendar",))
    arguments = "".join(piece.function.arguments for piece in (head, *more))
    assert json.loads(arguments)["day"] in ("today", "tomorrow")
    assert choices[-1].finish_reason == "tool_calls"


def test_a_schema_is_followed(client):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(model="tiny", messages=HI, response_format=form, max_tokens=100)
    value = json.loads(answer.choices[0].message.content)
    assert set(value) == {"ok", "kind"}
    assert value["kind"] in ("a", "b")


def test_a_regex_and_a_choice_are_followed(client):
    def ask(**extra: object) -> str:
        answer = client.completions.create(model="tiny", prompt="x", max_tokens=50, extra_body=extra)
        return answer.choices[0].text

    assert re.fullmatch(r"\d{3}-[ab]", ask(guided_regex=r"\d{3}-[ab]"))
    assert ask(structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")


def test_a_schema_that_is_none_is_refused_by_name(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HI, response_format=form)
    assert caught.value.param == "response_format"


def test_echoed_logprobs_are_those_of_the_completion(client):
    """What a completion was given token by token, its echo is given at once."""
    options = {"model": "tiny", "temperature": 0, "logprobs": 2, "extra_body": {"return_token_ids": True}}
    written = client.completions.create(prompt=[5, 6, 7], max_tokens=8, **options).choices[0]
    prompt = [5, 6, 7, *written.token_ids[:8]]
    echo = client.completions.create(prompt=prompt, max_tokens=1, echo=True, **options).choices[0]
    assert echo.logprobs.token_logprobs[0] is None
    assert len(echo.logprobs.tokens) == len(prompt) + 1
    for told, scored in zip(written.logprobs.token_logprobs, echo.logprobs.token_logprobs[3:], strict=False):
        assert math.isclose(told, scored, abs_tol=1e-4)


def test_biases_bans_and_allowed_tokens(client):
    def ids(**extra: object) -> list[int]:
        body = {"return_token_ids": True, "ignore_eos": True, **extra}
        answer = client.completions.create(
            model="tiny", prompt=[5, 6], temperature=0, max_tokens=4, extra_body=body
        )
        return answer.choices[0].token_ids

    free = ids()
    assert ids(logit_bias={"77": 100}) == [77] * 4
    assert set(ids(allowed_token_ids=[80, 81])) <= {80, 81}
    assert free[0] not in ids(logit_bias={str(free[0]): -100})


def test_choices_differ_and_come_again(client):
    options = {"model": "tiny", "prompt": "Once", "n": 3, "max_tokens": 12, "seed": 5, "temperature": 1.0}
    texts = [choice.text for choice in client.completions.create(**options).choices]
    assert len(set(texts)) > 1
    assert [choice.text for choice in client.completions.create(**options).choices] == texts


def test_text_to_tokens_and_back(stack):
    tokens = httpx.post(f"{stack.url}/tokenize", json={"prompt": "the thing is"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == 2048
    body = {"tokens": tokens["tokens"]}
    assert httpx.post(f"{stack.url}/detokenize", json=body).json() == {"prompt": "the thing is"}
