"""One stream to a worker: calls share it, a broken one is opened again, unread deltas are put together."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, aclosing

import pytest

from gateway.clients import WorkerClient
from protos.rpc.errors import DeadlineError, ServiceError, UnavailableError
from protos.wint2.common.v1.common_pb2 import TokenIds
from protos.wint2.worker.v1.worker_pb2 import GenerateRequest
from tests.fakes import FakeWorker, serving, worker_service


def generate(workers: WorkerClient, address: str, *, name: str = "r", timeout: float = 30.0):
    lost: asyncio.Future[ServiceError] = asyncio.get_running_loop().create_future()
    request = GenerateRequest(request_id=name, prompt=TokenIds(ids=[100, 101]))
    return workers.generate(address, request, timeout=timeout, lost=lost)


async def read_all(responses) -> list[str]:
    async with aclosing(responses):
        return [response.WhichOneof("event") async for response in responses]


@pytest.fixture
async def workers():
    client = WorkerClient()
    async with asyncio.timeout(30):
        yield client
        await client.close()


async def test_calls_at_the_same_time_are_each_whole(workers):
    async with serving(worker_service(FakeWorker(delay_seconds=0.002))) as address:
        kinds = await asyncio.gather(*(read_all(generate(workers, address, name=f"r{i}")) for i in range(20)))
    assert all(one[0] == "prompt_info" and one[-1] == "finish" and "delta" in one for one in kinds)


async def test_a_broken_stream_ends_its_calls_and_the_next_opens_another(workers, tmp_path):
    listen = f"unix:{tmp_path}/worker"
    async with AsyncExitStack() as first:
        await first.enter_async_context(serving(worker_service(FakeWorker(delay_seconds=60)), listen=listen))
        responses = generate(workers, listen)
        await anext(responses)
        await first.aclose()
        with pytest.raises(UnavailableError) as caught:
            await read_all(responses)
    assert caught.value.reason == "CONNECTION_LOST"
    async with serving(worker_service(FakeWorker()), listen=listen):
        while True:
            try:
                assert (await read_all(generate(workers, listen)))[-1] == "finish"
                return
            except UnavailableError:
                await asyncio.sleep(0.05)


async def test_deltas_that_nobody_reads_are_put_together(workers):
    worker = FakeWorker(completion=list(range(100, 140)))
    async with serving(worker_service(worker)) as address:
        responses = generate(workers, address)
        assert (await anext(responses)).HasField("prompt_info")
        while worker.live:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        async with aclosing(responses):
            deltas = [response.delta async for response in responses if response.HasField("delta")]
    assert len(deltas) <= 2
    assert [token_id for delta in deltas for token_id in delta.token_ids][:40] == list(range(100, 140))


async def test_the_time_of_a_call_is_limited_here_too(workers):
    worker = FakeWorker(delay_seconds=60)
    async with serving(worker_service(worker)) as address:
        with pytest.raises(DeadlineError):
            await read_all(generate(workers, address, timeout=0.1))
        while worker.live:
            await asyncio.sleep(0.01)
