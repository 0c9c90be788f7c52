"""GenerateMany: many calls on one stream, each with its own deadline, metadata, errors and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from google.rpc import status_pb2

from protos.rpc.channel import open_channel
from protos.rpc.errors import InvalidArgumentError, from_status
from protos.rpc.server import GrpcServer
from protos.wint2.common.v1 import common_pb2
from protos.wint2.worker.v1 import worker_pb2 as pb
from protos.wint2.worker.v1 import worker_pb2_grpc
from tests.fakes import WORKER, FakeWorker, worker_service


class Stream:
    """The client's side: what came so far, by call."""

    def __init__(self, channel) -> None:
        self._call = worker_pb2_grpc.WorkerServiceStub(channel).GenerateMany()
        self.kinds: dict[int, list[str]] = {}
        self.ends: dict[int, status_pb2.Status] = {}

    async def start(self, *call_ids: int, **fields) -> None:
        prompt = common_pb2.TokenIds(ids=[100, 101, 102])
        calls = [
            pb.GenerateCall(
                call_id=call_id, request=pb.GenerateRequest(request_id=f"r{call_id}", prompt=prompt), **fields
            )
            for call_id in call_ids
        ]
        await self._call.write(pb.GenerateManyRequest(starts=calls))

    async def cancel(self, *call_ids: int) -> None:
        await self._call.write(pb.GenerateManyRequest(cancelled_call_ids=call_ids))

    async def read_until_over(self, *call_ids: int) -> None:
        while not self.ends.keys() >= set(call_ids):
            await self.read()

    async def read(self) -> None:
        message = await self._call.read()
        for call in message.calls:
            kinds = [response.WhichOneof("event") for response in call.responses]
            self.kinds.setdefault(call.call_id, []).extend(kinds)
            if call.HasField("end_status"):
                self.ends[call.call_id] = status_pb2.Status.FromString(call.end_status)

    def leave(self) -> None:
        self._call.cancel()


@asynccontextmanager
async def stream_to(worker: FakeWorker) -> AsyncIterator[tuple[GrpcServer, Stream]]:
    server = GrpcServer("127.0.0.1:0", [WORKER])
    async with asyncio.timeout(30), open_channel(await server.start()) as channel:
        server.add(worker_service(worker))
        await server.set_serving(True)
        try:
            yield server, Stream(channel)
        finally:
            await server.stop()


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_calls_run_together_and_each_is_whole():
    async with stream_to(FakeWorker(delay_seconds=0.002)) as (_, stream):
        await stream.start(1, 2, 3)
        await stream.read_until_over(1, 2, 3)
    assert all(kinds == ["prompt_info", *["delta"] * 4, "finish"] for kinds in stream.kinds.values())
    assert all(status.code == 0 for status in stream.ends.values())


async def test_a_call_carries_its_metadata_and_its_deadline():
    seen: list[float | None] = []

    class Asks(FakeWorker):
        async def Generate(self, request, context):
            seen.append(context.time_remaining())
            async for response in super().Generate(request, context):
                yield response

    worker = Asks()
    async with stream_to(worker) as (_, stream):
        await stream.start(1, timeout_ms=60_000, metadata={"x-request-id": "mine"})
        await stream.start(2)
        await stream.read_until_over(1, 2)
    assert worker.metadata == [{"x-request-id": "mine"}, {}]
    assert seen[0] is not None
    assert 50 < seen[0] <= 60
    assert seen[1] is None


async def test_one_calls_failure_is_its_own():
    worker = FakeWorker(delay_seconds=0.01)
    worker.error, worker.error_after = InvalidArgumentError("no", field="prompt"), 2
    async with stream_to(worker) as (_, stream):
        await stream.start(1)
        await stream.read_until_over(1)
        worker.error = None
        await stream.start(2)
        await stream.read_until_over(2)
    assert stream.kinds[1] == ["prompt_info", "delta", "delta"]
    assert (error := from_status(stream.ends[1])).field == "prompt"
    assert isinstance(error, InvalidArgumentError)
    assert stream.ends[2].code == 0


async def test_a_bug_shows_no_internals(caplog):
    worker = FakeWorker()
    worker.error = RuntimeError("secret")
    async with stream_to(worker) as (_, stream):
        await stream.start(1)
        await stream.read_until_over(1)
    assert "secret" not in stream.ends[1].message
    assert "RuntimeError: secret" in caplog.text


async def test_a_call_id_is_not_used_twice():
    async with stream_to(FakeWorker(delay_seconds=60)) as (_, stream):
        await stream.start(1, 1)
        await stream.read_until_over(1)
    assert "in use" in stream.ends[1].message


@pytest.mark.parametrize("leave", [False, True])
async def test_a_cancelled_call_and_all_calls_of_a_client_that_leaves_are_ended(leave):
    worker = FakeWorker(delay_seconds=60)
    async with stream_to(worker) as (_, stream):
        await stream.start(1, 2)
        await until(lambda: worker.live == {"r1", "r2"})
        if leave:
            stream.leave()
        else:
            await stream.cancel(1)
        await until(lambda: worker.live == (set() if leave else {"r2"}))


async def test_a_drain_awaits_the_calls_and_refuses_new_ones():
    worker = FakeWorker()
    worker.may_finish.clear()
    async with stream_to(worker) as (server, stream):
        await stream.start(1)
        await stream.read()
        assert server.num_calls == 1
        drained = asyncio.create_task(server.drain(20))
        await until(lambda: server.is_draining)
        await stream.start(2)
        await stream.read_until_over(2)
        worker.may_finish.set()
        await stream.read_until_over(1)
        assert await drained == 0
    assert stream.kinds[1][-1] == "finish"
    assert from_status(stream.ends[2]).reason == "DRAINING"


async def test_what_nobody_reads_stays_with_the_call():
    """The engine's outputs gather behind a call that is ahead of its stream."""
    made: list[int] = []

    class Endless(FakeWorker):
        async def Generate(self, request, context):
            while True:
                made.append(1)
                yield pb.GenerateResponse(delta=pb.Delta(token_ids=[7] * 100_000))
                await asyncio.sleep(0)

    async with stream_to(Endless()) as (_, stream):
        await stream.start(1)
        await until(lambda: len(made) > 4)
        before = 0
        while len(made) != before:  # the stream's own buffers fill up, then no more is made
            before = len(made)
            await asyncio.sleep(0.3)
        assert before < 200
