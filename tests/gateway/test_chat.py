"""POST /v1/chat/completions with the openai client and on the wire."""

from __future__ import annotations

import json

from tests.fakes import FakeWorker
from tests.gateway.harness import MODEL, Stack

HELLO = [{"role": "user", "content": "héllo ✓"}]
PROMPT_TEXT = "user: héllo ✓\n"


async def test_answers(stack: Stack) -> None:
    answer = await stack.openai.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == PROMPT_TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == len(PROMPT_TEXT.encode())
    assert answer.usage.completion_tokens == len(PROMPT_TEXT.encode()) + 1
    assert answer._request_id


async def test_streams_whole_characters(stack: Stack) -> None:
    chunks = [
        c async for c in await stack.openai.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == PROMPT_TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


async def test_streamed_lines_end_with_done(stack: Stack) -> None:
    response = await stack.chat(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(line.removeprefix("data: "))["choices"] for line in lines[:-2])


async def test_usage_chunk_comes_last_and_without_choices(stack: Stack) -> None:
    stream = await stack.openai.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 2 * len(PROMPT_TEXT.encode()) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_continuous_usage_grows(stack: Stack) -> None:
    stream = await stack.openai.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"continuous_usage_stats": True}
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream]
    assert counts == sorted(counts)
    assert counts[-1] == len(PROMPT_TEXT.encode()) + 1


async def test_content_parts_are_joined(stack: Stack) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = await stack.openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": parts}]
    )
    assert answer.choices[0].message.content == "user: ab\n"


async def test_an_answer_can_be_sent_back(stack: Stack) -> None:
    first = await stack.openai.chat.completions.create(model=MODEL, messages=HELLO)
    history = [*HELLO, first.choices[0].message, {"role": "user", "content": "more"}]
    second = await stack.openai.chat.completions.create(model=MODEL, messages=history)
    assert second.choices[0].message.content.endswith("user: more\n")


async def test_several_choices(stack: Stack, worker: FakeWorker) -> None:
    answer = await stack.openai.chat.completions.create(model=MODEL, messages=HELLO, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {PROMPT_TEXT}
    assert answer.usage.prompt_tokens == len(PROMPT_TEXT.encode())
    assert answer.usage.completion_tokens == 3 * (len(PROMPT_TEXT.encode()) + 1)
    seeds = [request.sampling_params.seed for request in worker.requests]
    assert 7 in seeds
    assert len(set(seeds)) == 3


async def test_several_choices_stream_each_in_order(stack: Stack) -> None:
    stream = await stack.openai.chat.completions.create(model=MODEL, messages=HELLO, n=2, stream=True)
    texts = {0: "", 1: ""}
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: PROMPT_TEXT, 1: PROMPT_TEXT}


async def test_stop_string_across_tokens(stack: Stack, worker: FakeWorker) -> None:
    answer = await stack.openai.chat.completions.create(model=MODEL, messages=HELLO, stop=["never", "llo"])
    assert answer.choices[0].message.content == "user: hé"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "llo"
    assert answer.usage.completion_tokens == len("user: héllo".encode())
    assert worker.live == set()


async def test_stop_string_can_be_kept(stack: Stack) -> None:
    extra = {"include_stop_str_in_output": True}
    answer = await stack.openai.chat.completions.create(
        model=MODEL, messages=HELLO, stop="llo", extra_body=extra
    )
    assert answer.choices[0].message.content == "user: héllo"


async def test_length(stack: Stack) -> None:
    answer = await stack.openai.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=4)
    assert answer.choices[0].message.content == "user"
    assert answer.choices[0].finish_reason == "length"


async def test_logprobs(stack: Stack) -> None:
    answer = await stack.openai.chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=4
    )
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == list("user")
    assert content[0].logprob == -0.5
    assert content[0].bytes == [ord("u")]
    assert [len(entry.top_logprobs) for entry in content] == [2] * 4


async def test_streamed_logprobs_go_with_their_text(stack: Stack) -> None:
    stream = await stack.openai.chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, stream=True, max_tokens=4
    )
    async for chunk in stream:
        choice = chunk.choices[0]
        if choice.delta.content:
            assert [entry.token for entry in choice.logprobs.content] == list(choice.delta.content)


async def test_token_ids(stack: Stack) -> None:
    body = (await stack.chat("a", return_token_ids=True)).json()
    assert body["prompt_token_ids"] == [byte + 3 for byte in b"user: a\n"]
    assert body["choices"][0]["token_ids"] == body["prompt_token_ids"]


async def test_every_sampling_parameter_reaches_the_worker(stack: Stack, worker: FakeWorker) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5,
        "presence_penalty": -1.0, "frequency_penalty": 0.5, "seed": -3, "max_tokens": 9, "min_tokens": 2,
        "ignore_eos": True,
    }  # fmt: skip
    lists = {"stop_token_ids": [5, 6], "logit_bias": {"12": -100}}
    response = await stack.chat(**fields, **lists, logprobs=True, top_logprobs=3, priority=-2, cache_salt="s")
    assert response.status_code == 200
    [request] = worker.requests
    params = request.sampling_params
    assert {name: getattr(params, name) for name in fields} == fields
    assert list(params.stop_token_ids) == [5, 6]
    assert dict(params.logit_bias) == {12: -100.0}
    assert params.logprobs == 3
    assert (request.priority, request.cache_salt) == (-2, "s")


async def test_absent_parameters_stay_absent(stack: Stack, worker: FakeWorker) -> None:
    await stack.chat(temperature=None)
    assert [field.name for field, _ in worker.requests[0].sampling_params.ListFields()] == []


async def test_fastdeploys_top_p_of_zero(stack: Stack, worker: FakeWorker) -> None:
    assert (await stack.chat(top_p=0)).status_code == 200
    assert worker.requests[0].sampling_params.top_p == 0
