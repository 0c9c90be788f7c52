"""The openai package against the running stack."""

from __future__ import annotations

import openai
import pytest

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_chat_streams_what_it_answers_at_once(client):
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content != ""
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 12
    assert [c.finish_reason for chunk in chunks for c in chunk.choices][-1] == "length"
    assert whole.choices[0].finish_reason == "length"


def test_completions_stream_what_they_answer_at_once(client):
    whole = client.completions.create(prompt="The answer is", **GREEDY)
    chunks = client.completions.create(prompt="The answer is", stream=True, **GREEDY)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12


def test_token_ids_and_several_prompts(client):
    answer = client.completions.create(prompt=[[5, 6, 7], [8, 9]], **GREEDY)
    alone = client.completions.create(prompt=[8, 9], **GREEDY)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[1].text == alone.choices[0].text
    assert answer.usage.prompt_tokens == 5


def test_a_seed_gives_the_same_answer_again(client):
    options = {"model": "tiny", "prompt": "Once", "max_tokens": 16, "temperature": 1.0, "seed": 7}
    texts = {client.completions.create(**options).choices[0].text for _ in range(3)}
    assert len(texts) == 1


def test_a_stop_string_ends_the_answer_before_it(client):
    text = client.completions.create(prompt="The answer is", **GREEDY).choices[0].text
    stop = text[len(text) // 2 :][:2]
    answer = client.completions.create(prompt="The answer is", stop=[stop], **GREEDY).choices[0]
    assert answer.text == text.partition(stop)[0]
    assert answer.finish_reason == "stop"


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-9", prompt="x")
    assert caught.value.code == "model_not_found"
    assert "gpt-9" in caught.value.message


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * 2100, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert "2048" in caught.value.message
    assert "2100" in caught.value.message


@pytest.mark.parametrize(
    ("parameter", "value"), [("temperature", 3), ("top_p", -0.5), ("max_tokens", 0), ("stop", ["x"] * 100)]
)
def test_a_value_out_of_range_names_the_parameter(client, parameter, value):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", **{parameter: value})
    assert caught.value.param == parameter
    assert client.completions.create(prompt="x", **GREEDY).choices
