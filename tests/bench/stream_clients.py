"""Closed-loop clients of streamed completions, which speak just enough HTTP to cost little."""

from __future__ import annotations

import asyncio
import time

from tests.bench.echo_engine import COMPLETION_TOKENS, MODEL, Clocks, stream_ids
from tests.fakes import FIRST_BYTE_ID

PROMPT_TOKENS = 32


class Clients:
    """`clocks`: prompts are ids that tell the engine whose they are, and every token's way is timed.
    Without, `prompt` is text, and only whole answers are counted.
    """

    def __init__(self, port: int, clocks: Clocks | None = None, prompt: str = "") -> None:
        self.port = port
        self._clocks = clocks
        self._prompt = prompt
        self.num_done = 0
        self.delays: list[float] = []
        self.first: list[float] = []

    def forget(self) -> None:
        """What was counted so far."""
        self.num_done, self.delays, self.first = 0, [], []

    async def run(self, num_streams: int, seconds: float) -> float:
        """Requests per second."""
        started = time.monotonic()
        end = started + seconds
        await asyncio.gather(*(self._client(stream, end) for stream in range(num_streams)))
        return self.num_done / (time.monotonic() - started)

    async def _client(self, stream: int, end: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
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
            return f'{{{fields},"prompt":"{self._prompt}","stream_options":{{"include_usage":true}}}}'
        ids = stream_ids(stream) + [ord("x") + FIRST_BYTE_ID] * (PROMPT_TOKENS - 2)
        return f'{{{fields},"prompt":{ids},"return_token_ids":true}}'

    async def _read_answer(self, reader: asyncio.StreamReader, stream: int, asked: float) -> None:
        num_tokens, tail = 0, b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await reader.read(1 << 16)
            assert data, "the gateway closed the connection"
            now = time.monotonic()
            assert tail or data.startswith(b"HTTP/1.1 200"), data
            if b"data: {" in data and not num_tokens:
                self.first.append(now - asked)
            num_tokens += self._count(data, stream, num_tokens, now)
            tail = (tail + data)[-8:]
        assert num_tokens == COMPLETION_TOKENS, f"{num_tokens} tokens came, last {data[-300:]!r}"
        self.num_done += 1

    def _count(self, data: bytes, stream: int, num_before: int, now: float) -> int:
        """The tokens in what arrived; by their ids, or by the usage at the end."""
        if self._clocks is None:
            return COMPLETION_TOKENS if b'"completion_tokens":%d' % COMPLETION_TOKENS in data else 0
        count = 0
        for part in data.split(b'"token_ids":[')[1:]:
            count += part[: part.index(b"]")].count(b",") + 1 if part[:1] != b"]" else 0
        self.delays += [now - self._clocks[stream, num_before + at] for at in range(count)]
        return count
