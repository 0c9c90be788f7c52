"""The worker's composition, in this process: what becomes of it when its device fails."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from prometheus_client import CollectorRegistry

from gpu_worker.__main__ import SERVICE, run
from gpu_worker.engine.build import BuiltEngine
from gpu_worker.settings import WorkerSettings
from protos.rpc.channel import open_channel, watch_health
from protos.rpc.errors import FatalError, from_rpc_error
from protos.rpc.process import Shutdown
from protos.rpc.server import GrpcServer
from protos.wint2.common.v1.common_pb2 import SamplingParams, TokenIds
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.fakes import FakeScheduler, scheduler_service, serving
from tests.fakes_model import HashModel, make_engine


class Weightless(HashModel):
    """A hash model that can be described."""

    class memory:
        device_bytes = {"all": 0}  # noqa: RUF012


async def test_a_device_failure_ends_streams_health_registration_and_process_with_its_reason():
    model, shutdown, scheduler = Weightless(), Shutdown(), FakeScheduler()
    built = BuiltEngine(make_engine(model=model), model, ())
    server = GrpcServer("127.0.0.1:0", [SERVICE])
    async with (
        serving(scheduler_service(scheduler)) as at,
        server.listening() as address,
        asyncio.timeout(30),
    ):
        settings = WorkerSettings.from_command_line(["--model", "fake", "--scheduler", at])
        process = asyncio.create_task(run(settings, built, server, address, shutdown, CollectorRegistry()))
        async with open_channel(address) as channel:
            health = watch_health(channel)
            while not await anext(health):
                pass
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            params = SamplingParams(max_tokens=4, ignore_eos=True)
            request = worker_pb2.GenerateRequest(prompt=TokenIds(ids=[5]), sampling_params=params)
            assert len([event async for event in stub.Generate(request)]) > 2
            model.error = RuntimeError("CUDA error: device-side assert triggered")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Generate(request):
                    pass
            assert "device-side assert" in from_rpc_error(caught.value).message
            assert await anext(health) is False
            await health.aclose()
        with pytest.raises(FatalError, match="device-side assert"):
            await process
        while scheduler.num_connected:
            await asyncio.sleep(0.01)
        assert not scheduler.loads[-1].is_serving
