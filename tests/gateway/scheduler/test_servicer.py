"""SchedulerService over a socket: registrations, places, and a gateway that shares it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from gateway.scheduler.dispatcher import Dispatcher
from gateway.scheduler.scheduler import Scheduler, SchedulerConfig
from gateway.scheduler.servicer import scheduler_service
from protos.rpc.channel import open_channel
from protos.rpc.errors import from_rpc_error
from protos.wint2.scheduler.v1 import scheduler_pb2 as pb
from protos.wint2.scheduler.v1 import scheduler_pb2_grpc
from tests.fakes import FakeWorker, serving
from tests.gateway.harness import MODEL, registered, stack, until, worker

CONFIG = SchedulerConfig(reconnect_grace_seconds=1, silence_seconds=0.6, lost_seconds=1)


@pytest.fixture
async def address() -> AsyncIterator[str]:
    dispatcher = Dispatcher(Scheduler(CONFIG))
    async with dispatcher.running(), serving(scheduler_service(dispatcher)) as bound:
        yield bound


@pytest.fixture
async def stub(address: str) -> AsyncIterator[scheduler_pb2_grpc.SchedulerServiceAsyncStub]:
    async with open_channel(address) as channel:
        yield scheduler_pb2_grpc.SchedulerServiceStub(channel)


def schedule(stub, name: str, **fields):
    return stub.Schedule(pb.ScheduleRequest(request_id=name, model=MODEL, prompt_tokens=5, **fields))


async def test_queued_then_placed_until_the_call_ends(address: str, stub) -> None:
    async with registered(address, "w:1", max_num_seqs=1):
        first, second = schedule(stub, "a"), schedule(stub, "b")
        await until_async(lambda: placed(stub), 2)
        third = schedule(stub, "c")
        assert (await third.read()).queued.num_ahead == 0
        queue = await stub.GetQueue(pb.GetQueueRequest())
        assert [request.request_id for request in queue.waiting] == ["c"]
        first.cancel()
        while (response := await third.read()).WhichOneof("event") == "queued":
            pass
        assert response.placed.worker_id == "w:1"
        second.cancel(), third.cancel()
        await until_async(lambda: placed(stub), 0)


async def placed(stub) -> int:
    return (await stub.GetQueue(pb.GetQueueRequest())).num_placed


async def until_async(ask, wanted: int) -> None:
    async with asyncio.timeout(30):
        while await ask() != wanted:
            await asyncio.sleep(0.02)


async def test_lists_workers_with_their_load(address: str, stub) -> None:
    async with registered(address, "w:1"), registered(address, "w:2", is_serving=False):
        await until_async(lambda: num_serving(stub), 1)
        workers = (await stub.ListWorkers(pb.ListWorkersRequest())).workers
        assert [(w.worker_id, w.load.is_serving) for w in workers] == [("w:1", True), ("w:2", False)]
        assert workers[0].load_time.ToSeconds() > 1_000_000_000
    await until_async(lambda: num_workers(stub), 0)


async def num_serving(stub) -> int:
    workers = (await stub.ListWorkers(pb.ListWorkersRequest())).workers
    return sum(worker.load.is_serving for worker in workers)


async def num_workers(stub) -> int:
    return len((await stub.ListWorkers(pb.ListWorkersRequest())).workers)


@pytest.mark.parametrize("missing", ["instance_id", "address", "model", "max_model_len", "max_num_seqs"])
async def test_a_registration_is_complete(stub, missing: str) -> None:
    offer = pb.WorkerRegistration(instance_id="i", address="a", model="m", max_model_len=1, max_num_seqs=1)
    offer.ClearField(missing)

    async def events():
        yield pb.RegisterWorkerRequest(registration=offer)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.RegisterWorker(events()).read()
    assert from_rpc_error(caught.value).field == f"registration.{missing}"


async def test_a_silent_worker_loses_its_place(stub) -> None:
    async def events():
        offer = pb.WorkerRegistration(
            instance_id="i", address="a", model=MODEL, max_model_len=99, max_num_seqs=1
        )
        yield pb.RegisterWorkerRequest(registration=offer)
        yield pb.RegisterWorkerRequest(load=pb.WorkerLoad(is_serving=True))
        await asyncio.sleep(60)

    registration = stub.RegisterWorker(events())
    await registration.read()
    call = schedule(stub, "x")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert from_rpc_error(caught.value).reason == "WORKER_LOST"
    registration.cancel()


async def test_two_gateways_share_a_scheduler(address: str) -> None:
    fake = FakeWorker()
    async with worker(address, fake), stack(scheduler=address) as one, stack(scheduler=address) as two:
        await until(lambda: not one.gateway.readiness.reasons and not two.gateway.readiness.reasons)
        responses = await asyncio.gather(*(made.chat() for made in (one, two, one, two)))
        assert [response.status_code for response in responses] == [200] * 4
        assert len(fake.requests) == 4


async def test_a_client_that_leaves_frees_the_shared_place(address: str, stub) -> None:
    fake = FakeWorker(completion=[70] * 1000, delay_seconds=0.05)
    async with worker(address, fake), stack(scheduler=address) as made:
        await until(lambda: not made.gateway.readiness.reasons)
        task = asyncio.create_task(made.chat())
        await until(lambda: len(fake.live) == 1)
        task.cancel()
        await until(lambda: not fake.live)
        await until_async(lambda: placed(stub), 0)


async def test_a_gateway_says_when_its_scheduler_is_away() -> None:
    async with stack(scheduler="127.0.0.1:1") as made:
        await until(lambda: any("scheduler" in reason for reason in made.gateway.readiness.reasons))
        response = await made.chat()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "connection_lost")
