"""Many Generate calls over one stream: what becomes ready together travels as one message.

client ── starts, cancels ──►  a task a call ──┐
client ◄──── one message ────  outbox ◄────────┘    a call that is far ahead of the stream waits for it
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import cast

from protos.rpc.errors import InvalidArgumentError
from protos.rpc.interceptor import CallsInFlight, Context, current_calls, outcome_of
from protos.rpc.telemetry import bind_request_id, request_id_from
from protos.wint2.worker.v1.worker_pb2 import (
    GenerateCall,
    GenerateCallResponse,
    GenerateManyRequest,
    GenerateManyResponse,
    GenerateRequest,
    GenerateResponse,
)

METHOD = "/wint2.worker.v1.WorkerService/Generate"
# Responses of a call that may wait for the stream; beyond, the call itself waits and its tokens gather.
MAX_UNSENT = 4

Generate = Callable[[GenerateRequest, Context], AsyncIterator[GenerateResponse]]


async def generate_many(
    generate: Generate, requests: AsyncIterator[GenerateManyRequest]
) -> AsyncGenerator[GenerateManyResponse]:
    """GenerateMany in terms of Generate. Ends with the last call once the client begins no more."""
    calls = _Calls(generate, current_calls.get())
    reader = asyncio.create_task(calls.follow(requests))
    try:
        async for message in calls.messages():
            yield message
    finally:
        reader.cancel()
        await asyncio.gather(reader, *calls.cancel(), return_exceptions=True)


class _CallContext:
    """As much of a call's context as Generate reads."""

    def __init__(self, call: GenerateCall) -> None:
        self._metadata = tuple(call.metadata.items())
        has_deadline = call.HasField("timeout_ms")
        self._deadline = time.monotonic() + call.timeout_ms / 1e3 if has_deadline else None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())


class _Calls:
    """The calls of one stream, and what of them was not sent yet."""

    def __init__(self, generate: Generate, in_flight: CallsInFlight) -> None:
        self._generate = generate
        self._in_flight = in_flight
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._outbox: dict[int, GenerateCallResponse] = {}
        self._news = asyncio.Event()
        self._taken = asyncio.Event()
        self._is_closed = False

    async def follow(self, requests: AsyncIterator[GenerateManyRequest]) -> None:
        """Begins and cancels calls as the client says."""
        async for request in requests:
            for call in request.starts:
                self._start(call)
            for call_id in request.cancelled_call_ids:
                if task := self._tasks.get(call_id):
                    task.cancel()
        self._is_closed = True
        self._news.set()

    async def messages(self) -> AsyncGenerator[GenerateManyResponse]:
        """Everything that gathered since the last message, again and again."""
        while self._tasks or self._outbox or not self._is_closed:
            await self._news.wait()
            self._news.clear()
            outbox, self._outbox = self._outbox, {}
            self._taken.set()
            self._taken = asyncio.Event()
            if outbox:
                yield GenerateManyResponse(calls=outbox.values())

    def cancel(self) -> list[asyncio.Task[None]]:
        """Cancels what still runs; the tasks, to wait for."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        return tasks

    def _start(self, call: GenerateCall) -> None:
        if call.call_id in self._tasks:
            error = InvalidArgumentError(f"call id {call.call_id} is in use", field="call_id")
            self._entry(call.call_id).end_status = error.to_status().SerializeToString()
            return
        task = asyncio.create_task(self._run(call))
        self._tasks[call.call_id] = task
        task.add_done_callback(lambda _: self._leave(call.call_id))

    def _leave(self, call_id: int) -> None:
        del self._tasks[call_id]
        self._news.set()

    async def _run(self, call: GenerateCall) -> None:
        metadata: dict[str, str | bytes] = dict(call.metadata)
        request_id = request_id_from(metadata.items())
        bind_request_id(request_id)
        status = await outcome_of(METHOD, request_id, self._pass_on(call, metadata))
        self._entry(call.call_id).end_status = status.SerializeToString()

    async def _pass_on(self, call: GenerateCall, metadata: dict[str, str | bytes]) -> None:
        context = cast(Context, _CallContext(call))
        responses = cast("AsyncGenerator[GenerateResponse]", self._generate(call.request, context))
        with self._in_flight.stay(METHOD, metadata):
            async with aclosing(responses):
                async for response in responses:
                    entry = self._entry(call.call_id)
                    entry.responses.append(response)
                    if len(entry.responses) >= MAX_UNSENT:
                        await self._taken.wait()

    def _entry(self, call_id: int) -> GenerateCallResponse:
        """The call's part of the next message."""
        self._news.set()
        entry = self._outbox.get(call_id)
        if entry is None:
            entry = self._outbox[call_id] = GenerateCallResponse(call_id=call_id)
        return entry
