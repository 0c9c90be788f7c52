"""Closed-loop clients of streamed completions, which speak just enough HTTP to cost little, or none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import uvloop

from gateway.clients import WorkerClient
from protos.rpc.errors import ServiceError
from protos.wint2.common.v1.common_pb2 import SamplingParams, TokenIds
from protos.wint2.worker.v1.worker_pb2 import GenerateRequest, GenerateResponse
from tests.bench.echo_engine import COMPLETION_TOKENS, MODEL, Clocks, stream_ids
from tests.fakes import FIRST_BYTE_ID

PROMPT_TOKENS = 32


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
    over gRPC, past the gateway.
    """

    port: int
    clocks: Path | None = None
    prompt: str = ""
    num_processes: int = 1
    engine: str = ""

    def run(self, num_streams: int, seconds: float) -> Seen:
        """So many streams for so long, dealt out to the processes."""
        shares = [range(start, num_streams, self.num_processes) for start in range(self.num_processes)]
        with ProcessPoolExecutor(self.num_processes) as pool:
            return together(pool.map(self._run_share, shares, [seconds] * self.num_processes))

    def _run_share(self, streams: range, seconds: float) -> Seen:
        share = _DirectShare(self) if self.engine else _Share(self)
        started = time.process_time()
        uvloop.run(share.run(streams, seconds))
        share.seen.cpu_seconds = time.process_time() - started
        return share.seen


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


def prompt_ids(stream: int) -> list[int]:
    return stream_ids(stream) + [ord("x") + FIRST_BYTE_ID] * (PROMPT_TOKENS - 2)


class _Share:
    """The streams of one process."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._clocks = None if clients.clocks is None else Clocks(clients.clocks)
        self.seen = Seen()

    async def run(self, streams: range, seconds: float) -> None:
        started = time.monotonic()
        await asyncio.gather(*(self._client(stream, started + seconds) for stream in streams))
        self.seen.wall_seconds = time.monotonic() - started

    async def _client(self, stream: int, end: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._clients.port)
        body = self._body(stream)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
        while time.monotonic() < end:
            writer.write(request)
            await self._read_answer(reader, stream, time.monotonic())
        writer.close()

    def _body(self, stream: int) -> str:
        fields = f'"model":"{MODEL}","max_tokens":{COMPLETION_TOKENS},"stream":true,"ignore_eos":true'
        if self._clocks is None:
            return f'{{{fields},"prompt":"{self._clients.prompt}","stream_options":{{"include_usage":true}}}}'
        return f'{{{fields},"prompt":{prompt_ids(stream)},"return_token_ids":true}}'

    async def _read_answer(self, reader: asyncio.StreamReader, stream: int, asked: float) -> None:
        num_tokens, tail = 0, b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await reader.read(1 << 16)
            assert data, "the gateway closed the connection"
            now = time.monotonic()
            assert tail or data.startswith(b"HTTP/1.1 200"), data
            if b"data: {" in data and not num_tokens:
                self.seen.first.append(now - asked)
            num_tokens += self._count(data, stream, num_tokens, now)
            tail = (tail + data)[-8:]
        assert num_tokens == COMPLETION_TOKENS, f"{num_tokens} tokens came, last {data[-300:]!r}"
        self.seen.num_done += 1

    def _count(self, data: bytes, stream: int, num_before: int, now: float) -> int:
        """The tokens in what arrived; by their ids, or by the usage at the end."""
        if self._clocks is None:
            return COMPLETION_TOKENS if b'"completion_tokens":%d' % COMPLETION_TOKENS in data else 0
        count = 0
        for part in data.split(b'"token_ids":[')[1:]:
            count += part[: part.index(b"]")].count(b",") + 1 if part[:1] != b"]" else 0
        self._clock(stream, num_before, count, now)
        return count

    def _clock(self, stream: int, num_before: int, count: int, now: float) -> None:
        """How long ago the tokens that came now were made."""
        if self._clocks is not None:
            self.seen.delays += [now - self._clocks[stream, num_before + at] for at in range(count)]


class _DirectShare(_Share):
    """The same streams, read as a gateway reads them: over one call of the engine's."""

    async def run(self, streams: range, seconds: float) -> None:
        self._engine = WorkerClient()
        try:
            await super().run(streams, seconds)
        finally:
            await self._engine.close()

    async def _client(self, stream: int, end: float) -> None:
        params = SamplingParams(max_tokens=COMPLETION_TOKENS)
        request = GenerateRequest(prompt=TokenIds(ids=prompt_ids(stream)), sampling_params=params)
        while time.monotonic() < end:
            answer = _DirectAnswer(partial(self._clock, stream))
            never: asyncio.Future[ServiceError] = asyncio.get_running_loop().create_future()
            with self._engine.generate(self._clients.engine, request, answer, timeout=60, lost=never):
                await answer.is_over
            self.seen.num_done += 1


class _DirectAnswer:
    """A completion's tokens as they come."""

    def __init__(self, clock: Callable[[int, int, float], None]) -> None:
        self._clock = clock
        self._num_tokens = 0
        self.is_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_response(self, response: GenerateResponse) -> None:
        count = len(response.delta.token_ids)
        self._clock(self._num_tokens, count, time.monotonic())
        self._num_tokens += count

    def on_end(self, error: ServiceError | None) -> None:
        assert error is None, error
        self.is_over.set_result(None)
