"""The server's life: NOT_SERVING, SERVING, drain, and what a caller sees in each state."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from protos.rpc.channel import open_channel, wait_serving, watch_health
from protos.rpc.errors import (
    InvalidArgumentError,
    OverloadedError,
    StartupError,
    UnavailableError,
    from_rpc_error,
)
from protos.rpc.server import GrpcServer
from protos.wint2.common.v1.common_pb2 import TokenIds
from protos.wint2.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.fakes import (
    TOKENIZER,
    WORKER,
    FakeTokenizer,
    FakeWorker,
    connected,
    serving,
    tokenizer_service,
    worker_service,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def generate(channel, **fields):
    request = worker_pb2.GenerateRequest(request_id="r", prompt=TokenIds(ids=[5, 6, 7]), **fields)
    return worker_pb2_grpc.WorkerServiceStub(channel).Generate(request)


async def check(channel, service=""):
    request = health_pb2.HealthCheckRequest(service=service)
    return (await health_pb2_grpc.HealthStub(channel).Check(request)).status


@pytest.fixture
async def started():
    """A server that listens and has no services yet, and a channel to it."""
    server = GrpcServer("127.0.0.1:0", [WORKER])
    async with open_channel(await server.start()) as channel:
        yield server, channel
        await server.stop()


async def test_health_follows_the_life_of_the_server(started):
    server, channel = started
    assert await check(channel) == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(channel).read()
    assert (error := from_rpc_error(caught.value)).reason == "STARTING"
    assert error.retry_after_seconds
    server.add(worker_service(FakeWorker()))
    await server.set_serving(True)
    assert await check(channel) == await check(channel, WORKER.full_name) == SERVING
    assert len([message async for message in generate(channel)]) == 6  # prompt info, 3 ids, end, finish


async def test_a_drain_lets_calls_in_flight_finish_and_takes_no_new_ones(started):
    server, channel = started
    worker = FakeWorker()
    worker.may_finish.clear()
    server.add(worker_service(worker))
    await server.set_serving(True)
    responses = aiter(generate(channel))
    await anext(responses)
    drained = asyncio.create_task(server.drain(30))
    async with asyncio.timeout(30):
        while not server.is_draining:
            await asyncio.sleep(0.001)
    assert await check(channel) == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(channel).read()
    assert from_rpc_error(caught.value).reason == "DRAINING"
    worker.may_finish.set()
    rest = [message async for message in responses]
    assert rest[-1].HasField("finish")
    assert await drained == 0


async def test_a_drain_cancels_what_is_not_done_in_time(started):
    server, channel = started
    worker = FakeWorker(delay_seconds=60)
    server.add(worker_service(worker))
    await server.set_serving(True)
    call = generate(channel)
    await call.read()
    assert await server.drain(0.05) == 1
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()
    assert not worker.live


async def test_background_streams_do_not_hold_up_a_drain():
    server = GrpcServer("127.0.0.1:0", [TOKENIZER])
    async with open_channel(await server.start()) as channel:
        server.add(tokenizer_service(FakeTokenizer()))
        call = tokenizer_pb2_grpc.TokenizerServiceStub(channel).Detokenize()
        chunk = tokenizer_pb2.DetokenizeChunk(session_id=1, token_ids=[100])
        await call.write(tokenizer_pb2.DetokenizeRequest(chunks=[chunk]))
        assert (await call.read()).pieces[0].text == "a"
        async with asyncio.timeout(30):
            assert await server.drain(60) == 0


async def test_a_port_in_use_is_an_error_that_names_it():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"port {port}: address already in use"):
            await GrpcServer(f"127.0.0.1:{port}", []).start()


@pytest.mark.parametrize("address", ["nonsense", "localhost:", "localhost:99999", "no.such.host.invalid:0"])
async def test_a_wrong_address_is_an_error_that_names_it(address):
    with pytest.raises(StartupError, match=address):
        await GrpcServer(address, []).start()


async def test_unix_sockets_work(tmp_path):
    listen = f"unix:{tmp_path}/worker.sock"
    async with (
        serving(worker_service(FakeWorker()), listen=listen) as address,
        open_channel(address) as channel,
    ):
        assert address == listen
        assert len([message async for message in generate(channel)]) == 6


async def test_service_errors_arrive_with_their_details():
    worker = FakeWorker()
    worker.error = OverloadedError("full", metadata={"limit": "3"}, retry_after_seconds=2)
    async with connected(worker_service(worker)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in generate(channel):
                pass
    error = from_rpc_error(caught.value)
    assert isinstance(error, OverloadedError)
    assert (error.message, error.metadata, error.retry_after_seconds) == ("full", {"limit": "3"}, 2)


async def test_unary_errors_name_the_field():
    async with connected(tokenizer_service(FakeTokenizer())) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ApplyChatTemplate(tokenizer_pb2.ApplyChatTemplateRequest())
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidArgumentError)
    assert error.field == "messages"


async def test_unexpected_errors_keep_their_internals_and_leave_the_server_alive(caplog):
    worker = FakeWorker()
    worker.error = ZeroDivisionError("secret")
    async with connected(worker_service(worker)) as channel:
        call = generate(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in caught.value.details()
        worker.error = None
        assert len([message async for message in generate(channel)]) == 6
    assert "secret" in caplog.text


async def test_a_cancelled_call_leaves_the_servicer_at_once():
    worker = FakeWorker(delay_seconds=60)
    async with connected(worker_service(worker)) as channel:
        call = generate(channel)
        await call.read()
        assert worker.live == {"r"}
        call.cancel()
        async with asyncio.timeout(30):
            while worker.live:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("sent", ["abc-123", None])
async def test_the_request_id_comes_back(sent):
    async with connected(worker_service(FakeWorker())) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        call = stub.GetLoad(worker_pb2.GetLoadRequest(), metadata=[("x-request-id", sent)] if sent else None)
        returned = dict(await call.initial_metadata())["x-request-id"]
    assert returned == sent if sent else len(returned) == 32


async def test_reflection_lists_the_services():
    async with serving(worker_service(FakeWorker())) as address:

        def names():
            with grpc.insecure_channel(address) as channel:
                return set(ProtoReflectionDescriptorDatabase(channel).get_services())

        assert {WORKER.full_name, "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"} <= (
            await asyncio.to_thread(names)
        )


async def test_watch_follows_a_server_through_its_death_and_return():
    server = GrpcServer("127.0.0.1:0", [WORKER])
    address = await server.start()
    async with open_channel(address) as channel, asyncio.timeout(30):
        states = watch_health(channel)
        assert await anext(states) is False
        await server.set_serving(True)
        assert await anext(states) is True
        await server.stop()
        assert await anext(states) is False
        async with serving(worker_service(FakeWorker()), listen=address):
            assert await anext(states) is True
            await states.aclose()


async def test_wait_serving_says_how_long_it_waited(started):
    server, channel = started
    with pytest.raises(UnavailableError, match=r"not ready after 0.1 s"):
        await wait_serving(channel, timeout_seconds=0.1)
    await server.set_serving(True)
    await wait_serving(channel, WORKER.full_name, timeout_seconds=1)
