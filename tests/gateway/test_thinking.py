"""A limit on thinking: at the limit it is closed, what is left of the request goes on behind it."""

from __future__ import annotations

import httpx
import pytest

from tests.fakes import FIRST_BYTE_ID, FakeWorker, encode
from tests.gateway.harness import Stack


def text_of(token_ids: list[int]) -> str:
    return bytes(token_id - FIRST_BYTE_ID for token_id in token_ids if token_id >= FIRST_BYTE_ID).decode()


@pytest.fixture
def thinker(stack: Stack, worker: FakeWorker) -> FakeWorker:
    """A model whose prompts end inside of <think>; it says so much whatever it is asked."""
    stack.tokenizer.chat_template, stack.tokenizer.opening = "…</think>", "<think>\n"
    worker.completion = list(encode("0123456789").ids)
    return worker


async def ask(stack: Stack, **fields: object) -> dict:
    answer = (await stack.chat(**fields)).json()
    assert "choices" in answer, answer
    return answer


@pytest.mark.parametrize("field", ["thinking_token_budget", "reasoning_max_tokens"])
async def test_thinking_is_closed_at_the_limit(stack: Stack, thinker: FakeWorker, field: str) -> None:
    answer = await ask(stack, max_tokens=20, return_token_ids=True, **{field: 4})
    [choice] = answer["choices"]
    assert choice["message"]["reasoning_content"] == "0123"
    assert choice["message"]["content"] == "01234567"
    assert choice["finish_reason"] == "length"
    first, second = thinker.requests
    assert first.sampling_params.max_tokens == 4
    assert second.sampling_params.max_tokens == 20 - 4 - len("</think>")
    assert text_of(second.prompt.ids) == text_of(first.prompt.ids) + "0123</think>"
    assert text_of(choice["token_ids"]) == "0123</think>01234567"
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["usage"]["prompt_tokens"] == len(first.prompt.ids)


async def test_a_stream_goes_on_behind_the_limit(stack: Stack, thinker: FakeWorker) -> None:
    messages = [{"role": "user", "content": "hi"}]
    stream = await stack.openai.chat.completions.create(
        model="fake", messages=messages, stream=True, extra_body={"thinking_token_budget": 4}
    )
    deltas = [chunk.choices[0].delta async for chunk in stream]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "0123"
    assert "".join(delta.content or "" for delta in deltas) == "0123456789"


async def test_thinking_that_ended_before_is_left_alone(stack: Stack, thinker: FakeWorker) -> None:
    thinker.completion = list(encode("0</think>1").ids)
    answer = await ask(stack, thinking_token_budget=100)
    assert answer["choices"][0]["message"]["reasoning_content"] == "0"
    assert answer["choices"][0]["message"]["content"] == "1"
    assert len(thinker.requests) == 1


async def test_a_request_no_longer_than_the_limit_is_one_request(stack: Stack, thinker: FakeWorker) -> None:
    answer = await ask(stack, max_tokens=3, thinking_token_budget=4)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3
    assert len(thinker.requests) == 1


async def test_an_end_that_does_not_fit_is_not_written(stack: Stack, thinker: FakeWorker) -> None:
    answer = await ask(stack, max_tokens=6, thinking_token_budget=4)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["reasoning_content"] == "0123"
    assert answer["usage"]["completion_tokens"] == 4
    assert len(thinker.requests) == 1


async def test_what_cannot_be_limited_is_refused(stack: Stack, worker: FakeWorker) -> None:
    def refusal(answer: httpx.Response) -> tuple[int, str, str]:
        error = answer.json()["error"]
        return answer.status_code, error["param"], error["code"]

    plain = await stack.chat(thinking_token_budget=4)
    assert refusal(plain) == (400, "thinking_token_budget", "unsupported_parameter")
    formed = await stack.chat(reasoning_max_tokens=4, response_format={"type": "json_object"})
    assert refusal(formed) == (400, "reasoning_max_tokens", "invalid_value")
    twice = await stack.chat(reasoning_max_tokens=4, thinking_token_budget=4)
    assert refusal(twice) == (400, "reasoning_max_tokens", "invalid_value")


async def test_reasoning_effort_reaches_the_template(stack: Stack, worker: FakeWorker) -> None:
    await ask(stack, reasoning_effort="low", chat_template_kwargs={"enable_thinking": False})
    [conversation] = stack.tokenizer.conversations
    kwargs = dict(conversation.template_kwargs.items())
    assert kwargs == {"reasoning_effort": "low", "enable_thinking": False}
