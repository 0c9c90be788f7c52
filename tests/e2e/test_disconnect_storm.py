"""Clients that leave at every moment of a request, many at once: nothing of theirs stays behind."""

from __future__ import annotations

import asyncio
import random
import time

import grpc
import httpx

from protos.rpc.channel import open_channel
from protos.wint2.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.e2e.conftest import RunningStack

NUM_CLIENTS = 96
MOST_PATIENCE_SECONDS = 3.0
FREED_WITHIN_SECONDS = 30.0
LONG = {"max_tokens": 1500, "ignore_eos": True}


async def leave_http(http: httpx.AsyncClient, patience: random.Random) -> None:
    """Closes the connection while the request waits, streams, or computes a whole answer."""
    body = {"prompt": f"storm {patience.random()}", "stream": patience.random() < 0.7, **LONG}
    try:
        async with (
            asyncio.timeout(patience.uniform(0.05, MOST_PATIENCE_SECONDS)),
            http.stream("POST", "/v1/completions", json=body) as answer,
        ):
            async for _ in answer.aiter_raw():
                if patience.random() < 0.1:
                    return
    except TimeoutError:
        return


async def leave_grpc(channel: grpc.aio.Channel, patience: random.Random) -> None:
    """Cancels a call, or lets its deadline pass."""
    stub = gateway_pb2_grpc.GatewayServiceStub(channel)
    request = gateway_pb2.GenerateStreamRequest(text=f"storm {patience.random()}", sampling_params=LONG)
    call = stub.GenerateStream(request, timeout=patience.uniform(0.05, MOST_PATIENCE_SECONDS))
    try:
        async for _ in call:
            if patience.random() < 0.1:
                call.cancel()
    except (grpc.aio.AioRpcError, asyncio.CancelledError):
        return


async def load(stub: worker_pb2_grpc.WorkerServiceAsyncStub) -> worker_pb2.GetLoadResponse:
    return await stub.GetLoad(worker_pb2.GetLoadRequest())


def held(load: worker_pb2.GetLoadResponse) -> tuple[int, int, int]:
    return load.num_used_blocks, load.num_running, load.num_waiting


async def test_a_storm_of_disconnects_ends_at_zero_used_blocks(stack: RunningStack) -> None:
    patience = random.Random(7)
    limits = httpx.Limits(max_connections=None)
    busiest = 0
    async with (
        open_channel(stack.grpc_address) as channel,
        open_channel(stack.worker_address) as worker_channel,
        httpx.AsyncClient(base_url=stack.url, timeout=30, limits=limits) as http,
    ):
        worker = worker_pb2_grpc.WorkerServiceStub(worker_channel)
        storm = [leave_http(http, patience) for _ in range(NUM_CLIENTS * 3 // 4)]
        storm += [leave_grpc(channel, patience) for _ in range(NUM_CLIENTS // 4)]
        tasks = [asyncio.create_task(client) for client in storm]
        while not all(task.done() for task in tasks):
            busiest = max(busiest, (await load(worker)).num_used_blocks)
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)
        assert busiest > 4, "the storm was none"
        left = time.monotonic()
        while held(await load(worker)) != (0, 0, 0):
            assert time.monotonic() - left < FREED_WITHIN_SECONDS
            await asyncio.sleep(0.02)
        queue = (await http.get("/status")).json()["queue"]
        assert (queue["waiting"], queue["placed"]) == (0, 0)
        assert "wint2_gateway_num_requests_in_flight 0.0" in (await http.get("/metrics")).text
        body = {"prompt": "hello", "max_tokens": 4, "ignore_eos": True}
        answer = await http.post("/v1/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == 4
