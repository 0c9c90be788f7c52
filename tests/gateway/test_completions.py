"""POST /v1/completions: every kind of prompt, echo, logprobs, the older shapes."""

from __future__ import annotations

import json

import pytest

from tests.fakes import FakeWorker
from tests.gateway.harness import MODEL, Stack

IDS = [byte + 3 for byte in b"hi"]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("hi", ["hi"]), (["a", "b"], ["a", "b"]), (IDS, ["hi"]), ([IDS, IDS], ["hi", "hi"])],
)
async def test_kinds_of_prompt(stack: Stack, prompt: object, texts: list[str]) -> None:
    answer = await stack.openai.completions.create(model=MODEL, prompt=prompt)
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    assert answer.object == "text_completion"


async def test_sixteen_tokens_by_default(stack: Stack, worker: FakeWorker) -> None:
    answer = await stack.openai.completions.create(model=MODEL, prompt="x" * 40)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16


async def test_prompts_times_choices(stack: Stack) -> None:
    answer = await stack.openai.completions.create(model=MODEL, prompt=["a", "b"], n=2)
    assert [choice.text for choice in answer.choices] == ["a", "a", "b", "b"]
    assert answer.usage.prompt_tokens == 2


@pytest.mark.parametrize("prompt", ["hi", IDS])
@pytest.mark.parametrize("is_stream", [True, False])
async def test_echo(stack: Stack, prompt: object, is_stream: bool) -> None:
    answer = await stack.openai.completions.create(model=MODEL, prompt=prompt, echo=True, stream=is_stream)
    if is_stream:
        assert "".join([chunk.choices[0].text async for chunk in answer]) == "hihi"
    else:
        assert answer.choices[0].text == "hihi"


@pytest.mark.parametrize("is_stream", [True, False])
async def test_an_echo_of_the_prompt_alone(stack: Stack, worker: FakeWorker, is_stream: bool) -> None:
    fields = {"echo": True, "max_tokens": 0, "logprobs": 1}
    answer = await stack.openai.completions.create(model=MODEL, prompt="abc", stream=is_stream, **fields)
    parts = [chunk async for chunk in answer] if is_stream else [answer]
    assert "".join(part.choices[0].text for part in parts) == "abc"
    logprobs = [part.choices[0].logprobs for part in parts if part.choices[0].logprobs]
    assert [value for part in logprobs for value in part.token_logprobs] == [None, -0.5, -0.5]
    assert parts[-1].choices[0].finish_reason == "length"
    if not is_stream:
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 0)
    assert worker.requests[0].sampling_params.max_tokens == 1


async def test_streamed(stack: Stack) -> None:
    chunks = [c async for c in await stack.openai.completions.create(model=MODEL, prompt="hi", stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hi"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


@pytest.mark.parametrize("is_stream", [True, False])
async def test_logprobs_are_parallel_lists(stack: Stack, is_stream: bool) -> None:
    answer = await stack.openai.completions.create(model=MODEL, prompt="abc", logprobs=1, stream=is_stream)
    parts = [chunk async for chunk in answer] if is_stream else [answer]
    found = [part.choices[0].logprobs for part in parts if part.choices[0].logprobs]
    assert [token for part in found for token in part.tokens] == ["a", "b", "c"]
    assert [value for part in found for value in part.token_logprobs] == [-0.5] * 3
    assert [offset for part in found for offset in part.text_offset] == [0, 1, 2]
    assert [entry for part in found for entry in part.top_logprobs] == [{"a": -0.5}, {"b": -0.5}, {"c": -0.5}]


async def test_token_ids_of_prompt_and_completion(stack: Stack) -> None:
    [choice] = (await stack.complete("hi", return_token_ids=True)).json()["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (IDS, IDS)


async def test_streamed_token_ids(stack: Stack) -> None:
    text = (await stack.complete("hi", return_token_ids=True, stream=True)).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    assert chunks[0]["choices"][0]["prompt_token_ids"] == IDS
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])] == IDS


async def test_stop_token_of_the_request(stack: Stack, worker: FakeWorker) -> None:
    [choice] = (await stack.complete("hi", stop_token_ids=[2])).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"], choice["text"]) == ("stop", 2, "hi")


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("prompt", ["abc", [100, 101, 102]])
async def test_echoed_logprobs_cover_the_prompt(stack: Stack, prompt: object, is_stream: bool) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    answer = await stack.openai.completions.create(model=MODEL, prompt=prompt, stream=is_stream, **fields)
    parts = [chunk async for chunk in answer] if is_stream else [answer]
    found = [part.choices[0].logprobs for part in parts if part.choices[0].logprobs]
    assert [token for part in found for token in part.tokens] == ["a", "b", "c", "a"]
    assert [value for part in found for value in part.token_logprobs] == [None, -0.5, -0.5, -0.5]
    assert [entry for part in found for entry in part.top_logprobs] == [
        None, {"b": -0.5}, {"c": -0.5}, {"a": -0.5}
    ]  # fmt: skip
    assert [offset for part in found for offset in part.text_offset] == [0, 1, 2, 3]


async def test_logprobs_of_an_echo_of_one_token(stack: Stack) -> None:
    answer = await stack.complete("a", echo=True, logprobs=0, max_tokens=1)
    assert answer.json()["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5]


async def test_prompt_logprobs_by_name(stack: Stack) -> None:
    told = [None, {"101": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}]
    text = (await stack.complete("ab", prompt_logprobs=1, max_tokens=1)).json()
    assert text["choices"][0]["prompt_logprobs"] == told
    chat = (await stack.chat("x", prompt_logprobs=0, max_tokens=1)).json()
    assert len(chat["prompt_logprobs"]) == len("user: x\n")


async def test_bad_words_are_tokenized_both_ways(stack: Stack, worker: FakeWorker) -> None:
    await stack.complete("hi", bad_words=["a"], allowed_token_ids=[5, 6])
    params = worker.requests[0].sampling_params
    assert [list(run.ids) for run in params.bad_words_token_ids] == [[100], [35, 100]]
    assert list(params.allowed_token_ids) == [5, 6]
