"""Closed-loop clients of streamed completions, which speak just enough HTTP to cost little, or none.

While the load runs they note when what arrived; what it was is looked at afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import uvloop

from gateway.clients import WorkerClient
from protos.rpc.errors import ServiceError
from protos.wint2.common.v1.common_pb2 import SamplingParams, TokenIds
from protos.wint2.worker.v1.worker_pb2 import GenerateRequest, GenerateResponse
from tests.bench.echo_engine import COMPLETION_TOKENS, MODEL, Clocks, stream_ids
from tests.fakes import FIRST_BYTE_ID

PROMPT_TOKENS = 32
USAGE = b'"completion_tokens":%d' % COMPLETION_TOKENS
TOKENS = b'"token_ids":['


@dataclass
class Seen:
    """What clients saw: requests done, each token's delay and each request's first token in seconds."""

    num_done: int = 0
    delays: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.num_done / self.wall_seconds


@dataclass(frozen=True)
class Clients:
    """`clocks`: prompts are ids that tell the engine whose they are, and every token's way is timed.
    Without, `prompt` is text, and only whole answers are counted. With `engine`, its address, they ask it
    over gRPC, past the gateway. Each stream begins `ramp_seconds` after the one before it.
    """

    port: int
    clocks: Path | None = None
    prompt: str = ""
    num_processes: int = 1
    engine: str = ""
    ramp_seconds: float = 0.0

    def run(self, num_streams: int, seconds: float) -> Seen:
        """So many streams for so long, dealt out to the processes."""
        shares = [range(start, num_streams, self.num_processes) for start in range(self.num_processes)]
        with ProcessPoolExecutor(self.num_processes) as pool:
            return together(pool.map(self._run_share, shares, [seconds] * self.num_processes))

    def _run_share(self, streams: range, seconds: float) -> Seen:
        return uvloop.run(_Share(self).run(streams, seconds))


def together(shares: Iterable[Seen]) -> Seen:
    """What several processes saw at the same time."""
    whole = Seen()
    for seen in shares:
        whole.num_done += seen.num_done
        whole.delays += seen.delays
        whole.first += seen.first
        whole.cpu_seconds += seen.cpu_seconds
        whole.wall_seconds = max(whole.wall_seconds, seen.wall_seconds)
    return whole


# What arrived when: bytes of an answer, or so many tokens.
Arrivals = list[tuple[float, bytes | int]]


class _Client(Protocol):
    """Asks for one completion after another."""

    async def ask(self) -> Arrivals: ...

    def close(self) -> None: ...


class _Share:
    """The streams of one process."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._clocks = None if clients.clocks is None else Clocks(clients.clocks)
        self._worker = WorkerClient()
        self._answers: list[tuple[Arrivals, Sequence[float]]] = []
        self._first: list[float] = []

    async def run(self, streams: range, seconds: float) -> Seen:
        started, cpu_started = time.monotonic(), time.process_time()
        await asyncio.gather(*(self._stream(stream, started + seconds) for stream in streams))
        seen = Seen(len(self._answers), wall_seconds=time.monotonic() - started)
        seen.cpu_seconds = time.process_time() - cpu_started
        await self._worker.close()
        for arrivals, made in self._answers:
            seen.delays += delays(arrivals, made)
        seen.first = self._first
        return seen

    async def _stream(self, stream: int, end: float) -> None:
        await asyncio.sleep(self._clients.ramp_seconds * stream)
        client = await self._client(stream)
        while (asked := time.monotonic()) < end:
            arrivals = await client.ask()
            made = () if self._clocks is None else self._clocks.row(stream)
            self._first.append(next(when for when, what in arrivals if is_text(what)) - asked)
            self._answers.append((arrivals, made))
        client.close()

    async def _client(self, stream: int) -> _Client:
        if self._clients.engine:
            return _Direct(self._worker, self._clients.engine, stream)
        request = http_request(self._clients.prompt if self._clocks is None else prompt_ids(stream))
        loop, port = asyncio.get_running_loop(), self._clients.port
        _, client = await loop.create_connection(lambda: _Http(request), "127.0.0.1", port)
        return client


class _Http(asyncio.Protocol):
    """Over a connection of its own."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._arrivals: Arrivals = []
        self._is_over: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport  # uvloop's are no asyncio.Transport

    async def ask(self) -> Arrivals:
        self._arrivals = []
        self._is_over = is_over = asyncio.get_running_loop().create_future()
        self._transport.write(self._request)
        await is_over
        return self._arrivals

    def data_received(self, data: bytes) -> None:
        self._arrivals.append((time.monotonic(), data))
        if data.endswith(b"0\r\n\r\n") and self._is_over is not None:
            self._is_over.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._is_over is not None and not self._is_over.done():
            self._is_over.set_exception(exc or ConnectionError("the gateway closed the connection"))

    def close(self) -> None:
        self._transport.close()


class _Direct:
    """As a gateway asks: all streams of a process share one call of the engine's."""

    def __init__(self, worker: WorkerClient, engine: str, stream: int) -> None:
        self._worker = worker
        self._engine = engine
        params = SamplingParams(max_tokens=COMPLETION_TOKENS)
        self._request = GenerateRequest(prompt=TokenIds(ids=prompt_ids(stream)), sampling_params=params)

    async def ask(self) -> Arrivals:
        self._arrivals: Arrivals = []
        self._is_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        never: asyncio.Future[ServiceError] = asyncio.get_running_loop().create_future()
        with self._worker.generate(self._engine, self._request, self, timeout=60, lost=never):
            await self._is_over
        return self._arrivals

    def on_response(self, response: GenerateResponse) -> None:
        self._arrivals.append((time.monotonic(), len(response.delta.token_ids)))

    def on_end(self, error: ServiceError | None) -> None:
        assert error is None, error
        self._is_over.set_result(None)

    def close(self) -> None:
        """There is nothing of its own to close."""


def http_request(prompt: str | list[int]) -> bytes:
    fields = f'"model":"{MODEL}","max_tokens":{COMPLETION_TOKENS},"stream":true,"ignore_eos":true'
    if isinstance(prompt, str):
        body = f'{{{fields},"prompt":"{prompt}","stream_options":{{"include_usage":true}}}}'
    else:
        body = f'{{{fields},"prompt":{prompt},"return_token_ids":true}}'
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def prompt_ids(stream: int) -> list[int]:
    return stream_ids(stream) + [ord("x") + FIRST_BYTE_ID] * (PROMPT_TOKENS - 2)


def is_text(what: bytes | int) -> bool:
    return what > 0 if isinstance(what, int) else b"data: {" in what


def delays(arrivals: Arrivals, made: Sequence[float]) -> list[float]:
    """A token's time at the client minus its time at the engine, if that is known."""
    times = [when for when, what in arrivals for _ in range(num_tokens(what))]
    assert len(times) == COMPLETION_TOKENS, f"{len(times)} tokens came, last {arrivals[-1]}"
    return [came - was_made for came, was_made in zip(times, made, strict=True)] if made else []


def num_tokens(what: bytes | int) -> int:
    """The tokens in what arrived: by their ids, or by the usage at the end."""
    if isinstance(what, int):
        return what
    lists = [part[: part.index(b"]")] for part in what.split(TOKENS)[1:]]
    return sum(ids.count(b",") + 1 for ids in lists if ids) or COMPLETION_TOKENS * (USAGE in what)
