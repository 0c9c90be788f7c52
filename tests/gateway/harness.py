"""The real gateway over real sockets, with fake workers that register and a fake tokenizer behind it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
from openai import AsyncOpenAI

from gateway.settings import GatewaySettings
from gateway.stack import Gateway, running
from protos.rpc.channel import open_channel
from protos.rpc.security import PLAINTEXT, Security
from protos.wint2.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from tests.fakes import EOS, FakeTokenizer, FakeWorker, serving, tokenizer_service, worker_service

MODEL = "fake"


@dataclass
class Stack:
    """Everything a test talks to."""

    gateway: Gateway
    tokenizer: FakeTokenizer
    http: httpx.AsyncClient
    openai: AsyncOpenAI

    async def chat(self, content: str = "hi", **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
        return await self.http.post("/v1/chat/completions", json=body)

    async def complete(self, prompt: Any = "hi", **fields: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": MODEL, "prompt": prompt, **fields})


@contextlib.asynccontextmanager
async def stack(**settings: Any) -> AsyncIterator[Stack]:
    """A gateway with a tokenizer and no workers yet."""
    tokenizer = FakeTokenizer()
    async with serving(tokenizer_service(tokenizer)) as address:
        fields = {"http_host": "127.0.0.1", "http_port": 0, "listen": "127.0.0.1:0", "tokenizer": address}
        async with running(GatewaySettings(**{**fields, **settings})) as gateway:
            url = f"http://127.0.0.1:{gateway.http_port}"
            async with (
                httpx.AsyncClient(base_url=url, timeout=20) as http,
                AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as openai,
            ):
                yield Stack(gateway, tokenizer, http, openai)


@contextlib.asynccontextmanager
async def worker(
    stack_or_address: Stack | str, fake: FakeWorker | None = None, **offer: Any
) -> AsyncIterator[FakeWorker]:
    """A worker that serves and is registered while this is open; the gateway knows of it at once."""
    fake = fake or FakeWorker()
    scheduler = (
        stack_or_address if isinstance(stack_or_address, str) else stack_or_address.gateway.grpc_address
    )
    async with serving(worker_service(fake)) as address, registered(scheduler, address, **offer):
        if not isinstance(stack_or_address, str):
            await until(
                lambda: any(
                    w.registration.address == address for w in stack_or_address.gateway.readiness.workers
                )
            )
        yield fake


@contextlib.asynccontextmanager
async def registered(
    scheduler: str,
    address: str,
    *,
    is_serving: bool = True,
    security: Security = PLAINTEXT,
    **offer: Any,
) -> AsyncIterator[None]:
    """A registration whose stream stays open, with load reports."""
    fields = {"instance_id": address, "model": MODEL, "max_model_len": 4096, "max_num_seqs": 8}
    registration = scheduler_pb2.WorkerRegistration(
        address=address, eos_token_ids=[EOS], **{**fields, **offer}
    )
    is_known = asyncio.Event()

    async def events() -> AsyncIterator[scheduler_pb2.RegisterWorkerRequest]:
        yield scheduler_pb2.RegisterWorkerRequest(registration=registration)
        while True:
            yield scheduler_pb2.RegisterWorkerRequest(load=scheduler_pb2.WorkerLoad(is_serving=is_serving))
            await asyncio.sleep(0.3)

    async def register() -> None:
        async with open_channel(scheduler, security) as channel:
            async for _ in scheduler_pb2_grpc.SchedulerServiceStub(channel).RegisterWorker(events()):
                is_known.set()

    task = asyncio.create_task(register())
    try:
        await asyncio.wait_for(is_known.wait(), 30)
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


@contextlib.asynccontextmanager
async def serving_stack(
    fake: FakeWorker | None = None, **settings: Any
) -> AsyncIterator[tuple[Stack, FakeWorker]]:
    """A gateway that is ready, with one worker."""
    async with stack(**settings) as made, worker(made, fake) as only:
        await until(lambda: not made.gateway.readiness.reasons)
        yield made, only


async def until_waiting(stack: Stack, num_requests: int) -> None:
    """So many requests wait for a place."""
    async with open_channel(stack.gateway.grpc_address) as channel, asyncio.timeout(30):
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        while len((await stub.GetQueue(scheduler_pb2.GetQueueRequest())).waiting) != num_requests:
            await asyncio.sleep(0.01)


async def until(condition: Any, timeout_seconds: float = 30.0) -> None:
    async with asyncio.timeout(timeout_seconds):
        while not condition():
            await asyncio.sleep(0.01)
