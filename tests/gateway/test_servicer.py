"""GatewayService over gRPC: the same pipeline, with rich errors, deadlines and cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from protos.rpc.channel import open_channel
from protos.rpc.errors import ServiceError, from_rpc_error
from protos.wint2.common.v1 import common_pb2
from protos.wint2.gateway.v1 import gateway_pb2 as pb
from protos.wint2.gateway.v1 import gateway_pb2_grpc
from tests.fakes import FakeWorker
from tests.gateway.harness import MODEL, Stack, serving_stack, until, until_waiting


@pytest.fixture
async def stub(stack: Stack) -> AsyncIterator[gateway_pb2_grpc.GatewayServiceAsyncStub]:
    async with open_channel(stack.gateway.grpc_address) as channel:
        yield gateway_pb2_grpc.GatewayServiceStub(channel)


async def failure(call) -> ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return from_rpc_error(caught.value)


async def test_generate(stub) -> None:
    events = [event async for event in stub.GenerateStream(pb.GenerateStreamRequest(model=MODEL, text="hé"))]
    assert [event.WhichOneof("event") for event in events[:2]] == ["start", "delta"]
    assert (events[0].start.prompt_tokens, events[0].start.index) == (3, 0)
    assert "".join(event.delta.text for event in events) == "hé"
    assert events[-1].finish.reason == common_pb2.FINISH_REASON_STOP
    assert events[-1].finish.usage.completion_tokens == 4


async def test_generate_from_ids_until_a_stop_string(stub) -> None:
    ids = common_pb2.TokenIds(ids=[byte + 3 for byte in b"abcdef"])
    events = [e async for e in stub.GenerateStream(pb.GenerateStreamRequest(token_ids=ids, stop=["cd"]))]
    assert "".join(event.delta.text for event in events) == "ab"
    assert events[-1].finish.matched_stop == "cd"


async def test_chat(stub, worker: FakeWorker) -> None:
    request = pb.ChatStreamRequest(messages=[pb.ChatMessage(role="user", content="hi")])
    request.sampling_params.temperature = 0
    events = [event async for event in stub.ChatStream(request, metadata=(("x-request-id", "mine"),))]
    assert "".join(event.delta.text for event in events) == "user: hi\n"
    assert worker.requests[0].sampling_params.HasField("temperature")
    assert worker.metadata[0]["x-request-id"] == "mine"


async def test_generate_at_once(stub) -> None:
    request = pb.GenerateRequest(text="héllo", stop=["lo"])
    request.sampling_params.logprobs = 1
    [completion] = (await stub.Generate(request)).completions
    assert completion.text == "hél"
    assert [token_id - 3 for token_id in completion.token_ids] == list("héllo".encode())
    assert len(completion.logprobs) == len(completion.token_ids)
    assert completion.finish.matched_stop == "lo"
    assert completion.finish.usage.prompt_tokens == completion.start.prompt_tokens == 6


async def test_n_completions_are_told_apart(stub, worker: FakeWorker) -> None:
    request = pb.GenerateRequest(text="ab", sampling_params=common_pb2.SamplingParams(n=3, seed=5))
    answer = await stub.Generate(request)
    assert [(one.finish.index, one.text) for one in answer.completions] == [(0, "ab"), (1, "ab"), (2, "ab")]
    assert len({taken.sampling_params.seed for taken in worker.requests}) == 3
    assert not any(taken.sampling_params.HasField("n") for taken in worker.requests)


async def test_chat_at_once(stub) -> None:
    request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="hi")])
    [completion] = (await stub.Chat(request)).completions
    assert completion.text == "user: hi\n"
    assert completion.finish.reason == common_pb2.FINISH_REASON_STOP


async def test_tokenize_and_back(stub) -> None:
    tokens = await stub.Tokenize(pb.TokenizeRequest(texts=["é", "ab"]))
    assert [len(run.ids) for run in tokens.token_ids] == [2, 2]
    texts = await stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
    assert list(texts.texts) == ["é", "ab"]


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("Tokenize", pb.TokenizeRequest(), "texts"),
        ("Detokenize", pb.DetokenizeRequest(), "token_ids"),
        ("Generate", pb.GenerateRequest(), "prompt"),
        ("Chat", pb.ChatRequest(), "messages"),
        ("Generate", pb.GenerateRequest(text="x", sampling_params={"n": 129}), "sampling_params.n"),
        ("Generate", pb.GenerateRequest(text="x", sampling_params={"n": 0}), "sampling_params.n"),
    ],
)
async def test_unary_errors_name_the_field(stub, method: str, request_, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stub, method)(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert from_rpc_error(caught.value).field == field


async def test_each_call_has_an_access_line_with_its_speed(stub, caplog) -> None:
    caplog.set_level("INFO", "gateway.access")
    await stub.Generate(pb.GenerateRequest(text="abcdef"), metadata=(("x-request-id", "mine"),))
    await failure(stub.GenerateStream(pb.GenerateStreamRequest(text="x", model="none")))
    good, bad = caplog.records
    assert " OK " in good.message
    assert good.fields["completion_tokens"] == 7
    assert good.fields["tokens_per_second"] > 0
    assert " NOT_FOUND " in bad.message


async def test_a_full_queue_says_when_to_come_back() -> None:
    endless = FakeWorker(completion=[70] * 1000, delay_seconds=0.01)
    async with (
        serving_stack(endless, max_waiting=1) as (made, _),
        open_channel(made.gateway.grpc_address) as channel,
    ):
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        calls = [stub.GenerateStream(pb.GenerateStreamRequest(text="x")) for _ in range(9)]
        await until(lambda: len(endless.live) == 9)
        calls.append(stub.GenerateStream(pb.GenerateStreamRequest(text="x")))
        await until_waiting(made, 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(text="x"))
        error = from_rpc_error(caught.value)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (error.reason, error.retry_after_seconds) == ("QUEUE_FULL", 1.0)
        for call in calls:
            call.cancel()
        await until(lambda: not endless.live)


async def test_models(stub) -> None:
    [model] = (await stub.ListModels(pb.ListModelsRequest())).models
    assert (model.id, model.max_model_len, model.num_workers) == (MODEL, 4096, 1)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateStreamRequest(), "prompt"),
        (pb.GenerateStreamRequest(text=""), "text"),
        (pb.GenerateStreamRequest(text="x", stop=["x"] * 17), "stop"),
        (pb.GenerateStreamRequest(text="x", model="none"), "model"),
        (pb.GenerateStreamRequest(text="x" * 5000), "prompt"),
    ],
)
async def test_errors_name_the_field(stub, request_, field: str) -> None:
    error = await failure(stub.GenerateStream(request_))
    assert error.field == field


async def test_chat_errors(stub) -> None:
    assert (await failure(stub.ChatStream(pb.ChatStreamRequest()))).field == "messages"
    robot = pb.ChatStreamRequest(messages=[pb.ChatMessage(role="robot", content="x")])
    assert (await failure(stub.ChatStream(robot))).field == "messages.0.role"


async def test_deadline_and_cancellation_reach_the_worker() -> None:
    endless = FakeWorker(completion=[70] * 10_000, delay_seconds=0.01)
    async with serving_stack(endless) as (made, _), open_channel(made.gateway.grpc_address) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.GenerateStream(pb.GenerateStreamRequest(text="x"), timeout=0.3):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: not endless.live)
        call = stub.GenerateStream(pb.GenerateStreamRequest(text="x"))
        await call.read()
        call.cancel()
        await until(lambda: not endless.live)
        whole = stub.Generate(pb.GenerateRequest(text="x"))
        await until(lambda: endless.live)
        whole.cancel()
        await until(lambda: not endless.live)


async def test_drain_lets_a_call_finish() -> None:
    slow = FakeWorker(delay_seconds=0.02)
    async with serving_stack(slow) as (made, _), open_channel(made.gateway.grpc_address) as channel:
        call = gateway_pb2_grpc.GatewayServiceStub(channel).GenerateStream(
            pb.GenerateStreamRequest(text="abcdef")
        )
        await until(lambda: slow.live)
        draining = asyncio.create_task(made.gateway.drain(10))
        assert [event async for event in call][-1].WhichOneof("event") == "finish"
        await draining
