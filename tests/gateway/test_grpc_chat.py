"""Chat over gRPC with tools and reasoning: the HTTP API's reading and parsing in the wire's words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import grpc
import pytest

from protos.rpc.channel import open_channel
from protos.rpc.errors import from_rpc_error
from protos.wint2.gateway.v1 import gateway_pb2 as pb
from protos.wint2.gateway.v1 import gateway_pb2_grpc
from tests.fakes import FIRST_BYTE_ID, FakeWorker
from tests.gateway.harness import Stack

WEATHER = pb.Tool(
    name="weather",
    description="The weather of a city",
    parameters_json='{"type": "object", "properties": {"city": {"type": "string"}}}',
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
BROKEN = pb.Tool(name="f", parameters_json="{")
HI = pb.ChatMessage(role="user", content="hi")


@pytest.fixture
async def stub(stack: Stack) -> AsyncIterator[gateway_pb2_grpc.GatewayServiceAsyncStub]:
    async with open_channel(stack.gateway.grpc_address) as channel:
        yield gateway_pb2_grpc.GatewayServiceStub(channel)


def say(worker: FakeWorker, text: str) -> None:
    worker.completion = [byte + FIRST_BYTE_ID for byte in text.encode()]


async def test_calls_are_told_apart_from_text(stub, stack: Stack, worker: FakeWorker) -> None:
    say(worker, f"I look.\n{CALL}")
    request = pb.ChatRequest(messages=[HI], tools=[WEATHER])
    [completion] = (await stub.Chat(request)).completions
    assert completion.text == "I look."
    [call] = completion.tool_calls
    assert (call.name, json.loads(call.arguments_json)) == ("weather", {"city": "Bern"})
    offered = json.loads(stack.tokenizer.conversations[0].tools_json[0])
    assert offered["function"]["parameters"] == json.loads(WEATHER.parameters_json)


async def test_a_stream_tells_the_same(stub, worker: FakeWorker) -> None:
    say(worker, f"I look.\n{CALL}{CALL}")
    request = pb.ChatStreamRequest(messages=[HI], tools=[WEATHER], parallel_tool_calls=False)
    events = [event async for event in stub.ChatStream(request)]
    assert "".join(event.delta.text for event in events) == "I look."
    assert [call.name for event in events for call in event.delta.tool_calls] == ["weather"]
    assert events[-1].finish.usage.completion_tokens == len(worker.completion or ()) + 1


async def test_a_call_that_must_be_is_a_schema_for_the_engine(stub, worker: FakeWorker) -> None:
    say(worker, '[{"name": "weather", "arguments": {"city": "Bern"}}]')
    request = pb.ChatRequest(messages=[HI], tools=[WEATHER], tool_choice=pb.TOOL_CHOICE_REQUIRED)
    [completion] = (await stub.Chat(request)).completions
    assert (completion.text, len(completion.tool_calls)) == ("", 1)
    assert json.loads(worker.requests[0].sampling_params.structured_output.json_schema)["minItems"] == 1


async def test_what_a_tool_returned_travels_with_its_call(stub, stack: Stack) -> None:
    call = pb.ToolCall(id="c1", name="weather", arguments_json='{"city": "Bern"}')
    turns = [
        HI,
        pb.ChatMessage(role="assistant", tool_calls=[call], reasoning="look"),
        pb.ChatMessage(role="tool", content="sunny", tool_call_id="c1"),
    ]
    await stub.Chat(pb.ChatRequest(messages=turns, tools=[WEATHER]))
    _, called, told = stack.tokenizer.conversations[0].messages
    assert called["tool_calls"][0]["function"]["arguments"]["city"] == "Bern"
    assert called["reasoning_content"] == "look"
    assert (told["content"], told["tool_call_id"]) == ("sunny", "c1")


async def test_reasoning_is_told_apart(stub, stack: Stack, worker: FakeWorker) -> None:
    stack.tokenizer.chat_template, stack.tokenizer.opening = "{{ '<think>' }}…</think>", "<think>\n"
    say(worker, "Hm.\n</think>\n\nYes.")
    [completion] = (await stub.Chat(pb.ChatRequest(messages=[HI]))).completions
    assert (completion.reasoning, completion.text) == ("Hm.", "Yes.")


async def test_thinking_is_closed_at_its_budget(stub, stack: Stack, worker: FakeWorker) -> None:
    stack.tokenizer.chat_template, stack.tokenizer.opening = "…</think>", "<think>\n"
    say(worker, "0123456789")
    [completion] = (await stub.Chat(pb.ChatRequest(messages=[HI], thinking_token_budget=4))).completions
    assert (completion.reasoning, completion.text) == ("0123", "0123456789")
    request = pb.ChatStreamRequest(messages=[HI], thinking_token_budget=4)
    events = [event async for event in stub.ChatStream(request)]
    assert "".join(event.delta.reasoning for event in events) == "0123"
    assert events[-1].finish.usage == completion.finish.usage


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ChatRequest(messages=[pb.ChatMessage(role="tool", content="x")]), "messages.0.tool_call_id"),
        (pb.ChatRequest(messages=[HI], tools=[pb.Tool(name="no spaces")]), "tools.0.function.name"),
        (
            pb.ChatRequest(messages=[HI], tools=[BROKEN]),
            "tools.0.parameters_json",
        ),
        (pb.ChatRequest(messages=[HI], tools=[WEATHER, WEATHER]), "tools"),
        (pb.ChatRequest(messages=[HI], tool_choice=pb.TOOL_CHOICE_REQUIRED), "tool_choice"),
        (
            pb.ChatRequest(
                messages=[HI], tools=[WEATHER], sampling_params={"structured_output": {"regex": "a"}}
            ),
            "sampling_params.structured_output",
        ),
        (
            pb.ChatRequest(
                messages=[HI], thinking_token_budget=4, sampling_params={"structured_output": {"regex": "a"}}
            ),
            "sampling_params.structured_output",
        ),
        (pb.ChatRequest(messages=[HI], thinking_token_budget=0), "thinking_token_budget"),
        (pb.ChatRequest(messages=[HI], thinking_token_budget=4), "thinking_token_budget"),
    ],
)
async def test_errors_name_the_field(stub, request_: pb.ChatRequest, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Chat(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert from_rpc_error(caught.value).field == field
