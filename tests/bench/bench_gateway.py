"""What the gateway costs: an engine that echoes ids at a steady pace, a byte tokenizer, many clients.

python -m tests.bench.bench_gateway [--workers 2] [--streams 512] [--seconds 10]

Latency: a token's time at the client minus its time at the engine, over few streams at 50 tokens a second.
Throughput: requests of 32 tokens in, 64 out from closed-loop clients, all processes on this machine; and the
CPU time that a request costs the gateway's processes, by which two cores of their own would be limited.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import mmap
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from protos.rpc.channel import open_channel
from protos.wint2.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from protos.wint2.worker.v1 import worker_pb2
from tests.fakes import (
    EOS,
    FIRST_BYTE_ID,
    FakeTokenizer,
    FakeWorker,
    finish,
    serving,
    tokenizer_service,
    worker_service,
)

MODEL = "echo"
PROMPT_TOKENS, COMPLETION_TOKENS = 32, 64
MAX_STREAMS = 4096
LATENCY_STREAMS, LATENCY_STEP_SECONDS = 64, 0.02
CLOCK = struct.Struct("d")


class Clocks:
    """When the engine made each token of each stream: a file that worker and clients map."""

    def __init__(self, path: Path) -> None:
        size = MAX_STREAMS * (COMPLETION_TOKENS + 1) * CLOCK.size
        with path.open("ab") as file:
            file.truncate(size)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)

    def __setitem__(self, place: tuple[int, int], seconds: float) -> None:
        CLOCK.pack_into(self._map, self._offset(*place), seconds)

    def __getitem__(self, place: tuple[int, int]) -> float:
        return float(CLOCK.unpack_from(self._map, self._offset(*place))[0])

    def _offset(self, stream: int, token: int) -> int:
        return (stream * (COMPLETION_TOKENS + 1) + token) * CLOCK.size


@dataclass
class Echo:
    """A call that runs: its stream's number, what was made of it and what of that was sent."""

    request: worker_pb2.GenerateRequest
    began_at: float
    num_made: int = 0
    num_sent: int = 0
    sent_at: float = 0.0

    @property
    def stream(self) -> int:
        first, second = self.request.prompt.ids[:2]
        return first - FIRST_BYTE_ID + 256 * (second - FIRST_BYTE_ID)

    def prompt_info(self) -> worker_pb2.GenerateResponse:
        info = worker_pb2.PromptInfo(prompt_tokens=len(self.request.prompt.ids))
        return worker_pb2.GenerateResponse(prompt_info=info)

    def step(self, now: float, num_tokens: int, clocks: Clocks) -> list[worker_pb2.GenerateResponse]:
        """What so many more tokens have to say; nothing before the interval that was asked for."""
        count, prompt = self.request.sampling_params.max_tokens, self.request.prompt.ids
        made = min(count, self.num_made + num_tokens)
        for token in range(self.num_made, made):
            clocks[self.stream, token] = now
        self.num_made = made
        if made < count and self.num_sent and now - self.sent_at < self.request.min_delta_interval_ms / 1e3:
            return []
        ids = [prompt[token % len(prompt)] for token in range(self.num_sent, made)]
        self.num_sent, self.sent_at = made, now
        messages = [worker_pb2.GenerateResponse(delta=worker_pb2.Delta(token_ids=ids))]
        if made == count:
            done = finish(len(prompt), [FIRST_BYTE_ID] * count)
            messages.append(worker_pb2.GenerateResponse(finish=done))
        return messages


class EchoWorker(FakeWorker):
    """An engine's pace: every `step_seconds` a token for each sequence, all of them in one message."""

    def __init__(self, step_seconds: float, clocks: Clocks) -> None:
        super().__init__()
        self._step_seconds = step_seconds
        self._clocks = clocks

    async def GenerateMany(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        calls: dict[int, Echo] = {}
        reader = asyncio.create_task(self._follow(requests, calls))
        stepped_at = time.monotonic()
        while True:
            await asyncio.sleep(max(0.0, stepped_at + self._step_seconds - time.monotonic()))
            now = time.monotonic()
            num_steps = max(1, int((now - stepped_at) / self._step_seconds))  # a late engine catches up
            stepped_at = max(stepped_at + num_steps * self._step_seconds, now - self._step_seconds)
            told = [self._step(call_id, call, now, num_steps) for call_id, call in calls.items()]
            for call_id in [one.call_id for one in told if one.HasField("end_status")]:
                del calls[call_id]
            if told := [one for one in told if one.responses]:
                yield worker_pb2.GenerateManyResponse(calls=told)
        reader.cancel()

    async def _follow(self, requests: Any, calls: dict[int, Echo]) -> None:
        async for request in requests:
            for call in request.starts:
                calls[call.call_id] = Echo(call.request, time.monotonic())
            for call_id in request.cancelled_call_ids:
                calls.pop(call_id, None)

    def _step(self, call_id: int, call: Echo, now: float, num_steps: int) -> worker_pb2.GenerateCallResponse:
        told = worker_pb2.GenerateCallResponse(call_id=call_id)
        if call.num_made == 0:
            told.responses.append(call.prompt_info())
        told.responses.extend(call.step(now, num_steps, self._clocks))
        if call.num_sent == call.request.sampling_params.max_tokens:
            told.end_status = b""
        return told


async def run_worker(listen: str, scheduler: str, step_seconds: float, clocks: Path) -> None:
    registration = scheduler_pb2.WorkerRegistration(
        instance_id=listen, address=listen, model=MODEL, max_model_len=4096, max_num_seqs=MAX_STREAMS,
        eos_token_ids=[EOS],
    )  # fmt: skip

    async def events() -> AsyncIterator[scheduler_pb2.RegisterWorkerRequest]:
        yield scheduler_pb2.RegisterWorkerRequest(registration=registration)
        while True:
            yield scheduler_pb2.RegisterWorkerRequest(load=scheduler_pb2.WorkerLoad(is_serving=True))
            await asyncio.sleep(0.5)

    async with (
        serving(worker_service(EchoWorker(step_seconds, Clocks(clocks))), listen=listen),
        open_channel(scheduler) as channel,
    ):
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        async for _ in stub.RegisterWorker(events(), wait_for_ready=True):
            pass


async def run_tokenizer(listen: str) -> None:
    async with serving(tokenizer_service(FakeTokenizer()), listen=listen):
        await asyncio.Event().wait()


class Clients:
    """Closed-loop clients that speak just enough HTTP; they cost less than what they measure."""

    def __init__(self, port: int, clocks: Clocks) -> None:
        self._port = port
        self._clocks = clocks
        self.num_done = 0
        self.delays: list[float] = []
        self.first: list[float] = []

    async def run(self, num_streams: int, seconds: float) -> float:
        """Requests per second."""
        started = time.monotonic()
        end = started + seconds
        await asyncio.gather(*(self._client(stream, end) for stream in range(num_streams)))
        return self.num_done / (time.monotonic() - started)

    async def _client(self, stream: int, end: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        ids = [stream % 256 + FIRST_BYTE_ID, stream // 256 + FIRST_BYTE_ID]
        ids += [ord("x") + FIRST_BYTE_ID] * (PROMPT_TOKENS - 2)
        await asyncio.sleep(LATENCY_STEP_SECONDS * stream / LATENCY_STREAMS)
        body = f'{{"model":"{MODEL}","prompt":{ids},"max_tokens":{COMPLETION_TOKENS},"stream":true,'
        body += '"return_token_ids":true,"ignore_eos":true}'
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        while time.monotonic() < end:
            writer.write((head + body).encode())
            await self._read_answer(reader, stream, time.monotonic())
        writer.close()

    async def _read_answer(self, reader: asyncio.StreamReader, stream: int, asked: float) -> None:
        num_tokens, tail = 0, b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await reader.read(1 << 16)
            assert data, "the gateway closed the connection"
            now = time.monotonic()
            assert tail or data.startswith(b"HTTP/1.1 200"), data
            for part in data.split(b'"token_ids":[')[1:]:
                new = part[: part.index(b"]")].count(b",") + 1 if part[:1] != b"]" else 0
                if new:
                    self.first += [now - asked] * (not num_tokens)
                    self.delays += [now - self._clocks[stream, num_tokens + at] for at in range(new)]
                    num_tokens += new
            tail = (tail + data)[-8:]
        assert num_tokens == COMPLETION_TOKENS, f"{num_tokens} tokens came"
        self.num_done += 1


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of processes so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """A process and what it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in family(int(child)))]


@contextlib.contextmanager
def stack(
    folder: Path, options: argparse.Namespace, step_seconds: float
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The gateway's port and process, with tokenizer and engine behind it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tokenizer, gateway = f"unix:{folder}/tokenizer.sock", f"unix:{folder}/gateway.sock"
    me = [sys.executable, "-m", "tests.bench.bench_gateway", "--role"]
    flags = ["--http-host", "127.0.0.1", "--http-port", str(port), "--listen", gateway]
    flags += ["--tokenizer", tokenizer, "--log-level", "warning", "--max-waiting", str(MAX_STREAMS)]
    flags += ["--workers", str(options.workers)]
    pinned = ["taskset", "-c", options.gateway_cpus] if options.gateway_cpus else []
    engine = (gateway, str(step_seconds), str(folder / "clocks"))
    commands = [
        [*me, "tokenizer", tokenizer],
        [*pinned, sys.executable, "-m", "gateway", *flags],
        *([*me, "worker", f"unix:{folder}/{index}.sock", *engine] for index in range(options.engines)),
    ]
    env = {**os.environ, "GRPC_VERBOSITY": "ERROR"}
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) for command in commands]
    try:
        wait_ready(port)
        yield port, processes[1]
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(20)


def wait_ready(port: int) -> None:
    """Returns when connection after connection meets a process that is ready."""
    deadline, num_ready = time.monotonic() + 60, 0
    while num_ready < 20:
        assert time.monotonic() < deadline, "the gateway is not ready"
        num_ready = num_ready + 1 if is_ready(port) else 0
        time.sleep(0.0 if num_ready else 0.1)


def is_ready(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return b" 200 " in client.recv(64)
    return False


def measure(title: str, options: argparse.Namespace, num_streams: int, step_seconds: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clocks = Clocks(folder / "clocks")
        with stack(folder, options, step_seconds) as (port, gateway):
            uvloop.run(Clients(port, clocks).run(num_streams, 1.0))
            clients, before = Clients(port, clocks), cpu_seconds(family(gateway.pid))
            rate = uvloop.run(clients.run(num_streams, options.seconds))
            spent = (cpu_seconds(family(gateway.pid)) - before) / clients.num_done
    delays = statistics.quantiles(clients.delays, n=100)
    pace = f"{num_streams} streams, a token each {step_seconds * 1e3:g} ms"
    print(f"{title}: {options.workers} process(es), {pace}")
    print(f"  added to a token   p50 {delays[49] * 1e3:.2f} ms, p99 {delays[98] * 1e3:.2f} ms")
    print(f"  first token        p50 {statistics.median(clients.first) * 1e3:.1f} ms after the request")
    print(f"  throughput         {rate:.0f} requests/s, {rate * COMPLETION_TOKENS:.0f} tokens/s")
    print(f"  gateway's CPU      {spent * 1e3:.2f} ms a request: two cores carry {2 / spent:.0f} requests/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--gateway-cpus", help="cores for the gateway alone, as in 0,1")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    match options.role:
        case ["tokenizer", listen]:
            uvloop.run(run_tokenizer(listen))
        case ["worker", listen, scheduler, step, clocks]:
            uvloop.run(run_worker(listen, scheduler, float(step), Path(clocks)))
        case _:
            measure("latency", options, LATENCY_STREAMS, LATENCY_STEP_SECONDS)
            measure("throughput", options, options.streams, 0.01)


if __name__ == "__main__":
    main()
