"""Streaming clients of the HTTP API that cost little themselves, and what they saw."""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import string
import time
from dataclasses import dataclass

_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass(frozen=True, slots=True)
class Answer:
    """When a request was sent, began to be answered and was answered, and how many tokens that took."""

    sent: float
    first: float
    last: float
    num_tokens: int

    @property
    def first_seconds(self) -> float:
        return self.first - self.sent

    @property
    def token_seconds(self) -> float:
        """Between two tokens, after the first."""
        return (self.last - self.first) / max(1, self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that were sent at once."""

    answers: tuple[Answer, ...]

    @property
    def tokens_a_second(self) -> float:
        """From the first request sent to the last one answered: prompts included."""
        begin, end = min(a.sent for a in self.answers), max(a.last for a in self.answers)
        return sum(a.num_tokens for a in self.answers) / (end - begin)

    @property
    def token_seconds(self) -> float:
        return statistics.median(a.token_seconds for a in self.answers)

    @property
    def first_seconds(self) -> float:
        return statistics.median(a.first_seconds for a in self.answers)


def text_of(num_bytes: int, seed: int) -> str:
    """As many letters, of which a tokenizer without merges makes a token each."""
    return "".join(random.Random(seed).choices(string.ascii_lowercase, k=num_bytes))


def _request(prompt: str, num_tokens: int) -> bytes:
    fields = {"model": "bench", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
    fields |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    body = json.dumps(fields).encode()
    lines = "POST /v1/completions HTTP/1.1", "Host: bench", "Content-Type: application/json"
    return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode() + body


async def ask(port: int, prompt: str, num_tokens: int) -> Answer:
    """One streamed greedy completion of that many tokens. Raises RuntimeError if there was none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent, first, num_completion_tokens = time.perf_counter(), 0.0, 0
    writer.write(_request(prompt, num_tokens))
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            break
        if line.startswith(b"data: "):
            first = first or time.perf_counter()
            if found := _COMPLETION_TOKENS.search(line):
                num_completion_tokens = int(found[1])
        elif line.startswith(b"HTTP/1.1") and b" 200 " not in line:
            raise RuntimeError(f"{line!r} {await reader.read(2000)!r}")
    writer.close()
    if not num_completion_tokens:
        raise RuntimeError("the answer broke off")
    return Answer(sent, first, time.perf_counter(), num_completion_tokens)


async def ask_together(port: int, prompts: list[str], num_tokens: int) -> Load:
    return Load(tuple(await asyncio.gather(*(ask(port, prompt, num_tokens) for prompt in prompts))))
