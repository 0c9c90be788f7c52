"""What happens to a request when somebody leaves, dies, is slow or late."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import openai
import pytest

from gateway.readiness import POLL_SECONDS
from protos.rpc.errors import UnavailableError
from protos.rpc.server import GrpcServer
from tests.fakes import FakeWorker, worker_service
from tests.gateway.harness import (
    MODEL,
    Stack,
    registered,
    serving_stack,
    stack,
    until,
    until_waiting,
    worker,
)

HI = [{"role": "user", "content": "hi"}]
ENDLESS = [ord("x") + 3] * 100_000


def endless(delay_seconds: float = 0.01) -> FakeWorker:
    return FakeWorker(completion=ENDLESS, delay_seconds=delay_seconds)


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_client_that_leaves_cancels_the_worker(is_stream: bool) -> None:
    async with serving_stack(endless()) as (made, fake):
        task = asyncio.create_task(made.chat(stream=is_stream, n=3))
        await until(lambda: len(fake.live) == 3)
        task.cancel()
        await until(lambda: not fake.live, 2)
        queue = await made.gateway.readiness._scheduler.queue()
        assert queue.num_placed == 0


async def test_a_client_that_reads_nothing_is_given_up() -> None:
    async with serving_stack(endless(0), write_timeout=0.5) as (made, fake):
        with socket.create_connection(("127.0.0.1", made.gateway.http_port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            fields = {"stream": True, "logprobs": True, "top_logprobs": 20}  # large chunks fill buffers soon
            body = json.dumps({"model": MODEL, "messages": HI, **fields}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            await until(lambda: len(fake.live) == 1)
            await until(lambda: not fake.live, 20)


async def test_a_worker_that_dies_ends_the_stream_with_an_error() -> None:
    service = worker_service(endless())
    server = GrpcServer("127.0.0.1:0", [service.descriptor])
    address = await server.start()
    server.add(service)
    async with stack() as made, registered(made.gateway.grpc_address, address):
        await until(lambda: not made.gateway.readiness.reasons)
        chunks = await made.openai.chat.completions.create(model=MODEL, messages=HI, stream=True)
        text = ""
        while not text:
            text = (await anext(chunks)).choices[0].delta.content or ""
        await server.stop()
        with pytest.raises(openai.APIError) as caught:
            await asyncio.wait_for(exhaust(chunks), 30)
    assert caught.value.code == "connection_lost"


async def exhaust(chunks: AsyncIterator[object]) -> None:
    async for _ in chunks:
        pass


async def test_the_stream_of_a_dead_worker_ends_with_done() -> None:
    fake = FakeWorker(completion=ENDLESS)
    fake.error, fake.error_after = UnavailableError("gone"), 3
    async with serving_stack(fake) as (made, _):
        lines = (await made.chat(stream=True)).text.split("\n\n")
        assert json.loads(lines[-3].removeprefix("data: "))["error"]["type"] == "server_error"
        assert lines[-2:] == ["data: [DONE]", ""]


async def test_before_the_first_token_another_worker_takes_over() -> None:
    broken = FakeWorker()
    broken.error = UnavailableError("draining", reason="DRAINING")
    async with serving_stack(broken) as (made, _), worker(made) as good:
        for _ in range(4):
            response = await made.chat()
            assert response.status_code == 200
        assert len(good.requests) == 4
        assert broken.requests


async def test_after_the_first_token_nobody_takes_over() -> None:
    broken = FakeWorker()
    broken.error, broken.error_after = UnavailableError("gone"), 1
    async with serving_stack(broken) as (made, _), worker(made, is_serving=False) as good:
        assert (await made.chat()).status_code == 503
        assert len(broken.requests) == 1
        assert good.requests == []


async def test_requests_wait_for_room() -> None:
    fake = FakeWorker(delay_seconds=0.005)
    async with stack() as made, worker(made, fake, max_num_seqs=1):
        responses = await asyncio.gather(*(made.chat() for _ in range(8)))
        assert [response.status_code for response in responses] == [200] * 8


async def test_a_full_queue_answers_429() -> None:
    fake = endless()
    async with stack(max_waiting=1) as made, worker(made, fake, max_num_seqs=1):
        tasks = [asyncio.create_task(made.chat()) for _ in range(3)]
        await until(lambda: len(fake.live) == 2)
        await until_waiting(made, 1)
        with pytest.raises(openai.RateLimitError) as caught:
            await made.openai.chat.completions.create(model=MODEL, messages=HI)
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["retry-after"] == "1"
        for task in tasks:
            task.cancel()


async def test_waiting_too_long_is_503() -> None:
    fake = endless()
    async with stack(queue_timeout=0.3) as made, worker(made, fake, max_num_seqs=1):
        tasks = [asyncio.create_task(made.chat()) for _ in range(2)]
        await until(lambda: len(fake.live) == 2)
        response = await made.chat()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_timeout")
        for task in tasks:
            task.cancel()


async def test_the_deadline_ends_worker_and_request() -> None:
    async with serving_stack(endless(), request_timeout=0.5) as (made, fake):
        response = await made.chat()
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        await until(lambda: not fake.live)
        lines = (await made.chat(stream=True)).text.split("\n\n")
        assert "deadline_exceeded" in lines[-3]


async def test_readiness_follows_the_worker() -> None:
    async with stack() as made:
        await until(lambda: made.gateway.readiness.reasons == ["no worker is registered"])
        response = await made.http.get("/health/ready")
        assert (response.status_code, response.json()["reasons"]) == (503, ["no worker is registered"])
        assert (await made.http.get("/health/live")).status_code == 200
        async with worker(made, is_serving=False):
            assert "none of the 1 registered" in (await made.http.get("/health")).json()["reasons"][0]
        async with worker(made):
            await until_health(made, 200)
        await until_health(made, 503)
    assert POLL_SECONDS < 0.5  # a worker's end is known at once, and asked for so often


async def until_health(made: Stack, status: int) -> None:
    async with asyncio.timeout(30):
        while (await made.http.get("/health")).status_code != status:
            await asyncio.sleep(0.02)


async def test_a_request_waits_for_a_worker_that_comes_back() -> None:
    async with stack() as made:
        async with worker(made):
            assert (await made.chat()).status_code == 200
        waiting = asyncio.create_task(made.chat())
        await until_waiting(made, 1)
        async with worker(made):
            assert (await waiting).status_code == 200


async def test_a_request_does_not_wait_beyond_the_grace() -> None:
    async with stack(reconnect_grace=0.3) as made:
        async with worker(made):
            pass
        response = await made.chat()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_worker")


async def test_drain_finishes_what_runs_and_refuses_the_rest() -> None:
    async with serving_stack() as (made, fake):
        fake.may_finish.clear()
        running = asyncio.create_task(made.chat())
        await until(lambda: len(fake.live) == 1)
        draining = asyncio.create_task(made.gateway.drain(10))
        await until(lambda: made.gateway.readiness.is_draining)
        refused = await made.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert (await made.http.get("/health")).status_code == 503
        fake.may_finish.set()
        assert (await running).status_code == 200
        await draining


async def test_drain_ends_at_its_limit() -> None:
    async with serving_stack(endless()) as (made, fake):
        running = asyncio.create_task(made.chat())
        await until(lambda: len(fake.live) == 1)
        await made.gateway.drain(0.3)
        await until(lambda: not fake.live)
        running.cancel()
