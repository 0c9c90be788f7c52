"""One stream to a worker: calls share it, and a broken one is opened again."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AsyncExitStack

import pytest

from gateway.clients import WorkerClient
from protos.rpc.errors import DeadlineError, ServiceError, UnavailableError
from protos.wint2.common.v1.common_pb2 import TokenIds
from protos.wint2.worker.v1.worker_pb2 import GenerateRequest, GenerateResponse
from tests.fakes import FakeWorker, serving, worker_service


class Reader:
    """A sink whose responses can be awaited."""

    def __init__(self) -> None:
        self.arrived: asyncio.Queue[GenerateResponse | None] = asyncio.Queue()
        self.error: ServiceError | None = None

    def on_response(self, response: GenerateResponse) -> None:
        self.arrived.put_nowait(response)

    def on_end(self, error: ServiceError | None) -> None:
        self.error = error
        self.arrived.put_nowait(None)

    async def kinds(self) -> list[str]:
        """Of all responses; raises what the call ended with."""
        found = []
        while (response := await self.arrived.get()) is not None:
            found.append(response.WhichOneof("event"))
        if self.error is not None:
            raise self.error
        return found


@contextlib.contextmanager
def generating(workers: WorkerClient, address: str, *, name: str = "r", timeout: float = 30.0):
    lost: asyncio.Future[ServiceError] = asyncio.get_running_loop().create_future()
    request = GenerateRequest(request_id=name, prompt=TokenIds(ids=[100, 101]))
    reader = Reader()
    with workers.generate(address, request, reader, timeout=timeout, lost=lost):
        yield reader


async def kinds_of(workers: WorkerClient, address: str, **options) -> list[str]:
    with generating(workers, address, **options) as reader:
        return await reader.kinds()


@pytest.fixture
async def workers():
    client = WorkerClient()
    async with asyncio.timeout(30):
        yield client
        await client.close()


async def test_calls_at_the_same_time_are_each_whole(workers):
    async with serving(worker_service(FakeWorker(delay_seconds=0.002))) as address:
        kinds = await asyncio.gather(*(kinds_of(workers, address, name=f"r{i}") for i in range(20)))
    assert all(one[0] == "prompt_info" and one[-1] == "finish" and "delta" in one for one in kinds)


async def test_a_broken_stream_ends_its_calls_and_the_next_opens_another(workers, tmp_path):
    listen = f"unix:{tmp_path}/worker"
    async with AsyncExitStack() as first:
        await first.enter_async_context(serving(worker_service(FakeWorker(delay_seconds=60)), listen=listen))
        with generating(workers, listen) as reader:
            await reader.arrived.get()
            await first.aclose()
            with pytest.raises(UnavailableError) as caught:
                await reader.kinds()
    assert caught.value.reason == "CONNECTION_LOST"
    async with serving(worker_service(FakeWorker()), listen=listen):
        while True:
            try:
                assert (await kinds_of(workers, listen))[-1] == "finish"
                return
            except UnavailableError:
                await asyncio.sleep(0.05)


async def test_the_time_of_a_call_is_limited_here_too(workers):
    worker = FakeWorker(delay_seconds=60)
    async with serving(worker_service(worker)) as address:
        with pytest.raises(DeadlineError):
            await kinds_of(workers, address, timeout=0.1)
        while worker.live:
            await asyncio.sleep(0.01)
