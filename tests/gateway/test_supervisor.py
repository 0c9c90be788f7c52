"""Several gateway processes on one port: they serve the same workers, count together, and end together."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from gateway.scheduler.dispatcher import Dispatcher
from gateway.scheduler.follower import Follower
from gateway.scheduler.scheduler import Scheduler, SchedulerConfig
from gateway.supervisor import Watch
from protos.rpc.process import EXIT_FAILED
from protos.wint2.scheduler.v1 import scheduler_pb2 as pb
from tests.fakes import FakeTokenizer, FakeWorker, serving, tokenizer_service, worker_service
from tests.gateway.harness import MODEL, registered, until


@contextlib.asynccontextmanager
async def two_processes(folder: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """`python -m gateway --workers 2` with a worker behind it, every process ready; and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    listen = f"unix:{folder}/gateway.sock"
    async with (
        serving(tokenizer_service(FakeTokenizer())) as tokenizer,
        serving(worker_service(FakeWorker())) as worker,
    ):
        flags = ["--workers", "2", "--http-host", "127.0.0.1", "--http-port", str(port), "--listen", listen]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", *flags, "--tokenizer", tokenizer, "--log-level", "warning",
            stdout=asyncio.subprocess.PIPE, env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for _ in range(2):
                assert (await asyncio.wait_for(process.stdout.readline(), 40)).startswith(b"ready")
            async with registered(listen, worker):
                url = f"http://127.0.0.1:{port}"
                await all_ready(url)
                yield process, url
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def all_ready(url: str) -> None:
    """Connection after connection meets a process that knows the worker."""
    num_ready = 0
    async with asyncio.timeout(60):
        while num_ready < 12:
            async with httpx.AsyncClient(base_url=url) as http:
                status = (await http.get("/health")).status_code
            num_ready = num_ready + 1 if status == 200 else 0
            await asyncio.sleep(0.02)


async def complete(url: str) -> str:
    """On a connection of its own, so that either process may answer."""
    async with httpx.AsyncClient(base_url=url, timeout=20) as http:
        response = await http.post("/v1/completions", json={"prompt": "hi", "model": MODEL})
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]


async def test_two_processes_serve_and_count_together_and_drain(tmp_path: Path) -> None:
    async with two_processes(tmp_path) as (process, url):
        assert set(await asyncio.gather(*(complete(url) for _ in range(12)))) == {"hi"}
        async with httpx.AsyncClient(base_url=url) as http:
            text = (await http.get("/metrics")).text
        assert re.search(r"^wint2_gateway_prompt_tokens_total 24\.0$", text, re.MULTILINE)
        assert re.search(r"^wint2_gateway_num_requests_in_flight 0\.0$", text, re.MULTILINE)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0


async def test_when_one_dies_all_end() -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=time.sleep, args=(60,)) for _ in range(2)]
    for process in processes:
        process.start()
    processes[0].kill()
    assert await asyncio.wait_for(Watch(processes).run(), 20) == EXIT_FAILED
    assert not processes[1].is_alive()


async def test_a_follower_lists_what_the_first_lists() -> None:
    dispatcher = Dispatcher(Scheduler(SchedulerConfig(reconnect_grace_seconds=0)))

    def worker(name: str, *, is_serving: bool = True) -> pb.Worker:
        offer = pb.WorkerRegistration(instance_id=name, address=name, model="m", max_num_seqs=1)
        return pb.Worker(worker_id=name, registration=offer, load=pb.WorkerLoad(is_serving=is_serving))

    listed = [worker("a"), worker("b", is_serving=False)]

    async def list_workers() -> list[pb.Worker]:
        return listed

    def seen() -> dict[str, bool]:
        return {one.worker_id: one.load.is_serving for one in dispatcher.list_workers()}

    async with Follower(dispatcher, list_workers).following():
        await until(lambda: seen() == {"a": True, "b": False})
        listed[:] = [worker("b")]
        await until(lambda: seen() == {"b": True})
