"""Generate calls to one worker: all completions of this process share one stream.

start(), close() ── what gathered ──► worker
sink  ◄──────────── its share ─────── one message for all that became ready together
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol

import grpc
from google.rpc import status_pb2

from protos.rpc.errors import DeadlineError, ServiceError, UnavailableError, from_status
from protos.rpc.telemetry import outgoing_metadata
from protos.wint2.worker.v1 import worker_pb2_grpc
from protos.wint2.worker.v1.worker_pb2 import (
    GenerateCall,
    GenerateCallResponse,
    GenerateManyRequest,
    GenerateManyResponse,
    GenerateRequest,
    GenerateResponse,
)

Stream = grpc.aio.StreamStreamCall[GenerateManyRequest, GenerateManyResponse]
Explain = Callable[[grpc.aio.AioRpcError], ServiceError]


def connection_lost() -> ServiceError:
    """The worker went away without a word."""
    message = "the connection to the worker failed"
    return UnavailableError(message, reason="CONNECTION_LOST", retry_after_seconds=1)


class ResponseSink(Protocol):
    """Who wants a call's responses."""

    def on_response(self, response: GenerateResponse) -> None:
        """The next one."""

    def on_end(self, error: ServiceError | None) -> None:
        """No more, and why if that is not well."""


class WorkerStream:
    """Opens the stream when first needed, and again after it broke; the calls of a broken stream fail."""

    def __init__(self, stub: worker_pb2_grpc.WorkerServiceAsyncStub, explain: Explain) -> None:
        self._stub = stub
        self._explain = explain
        self._call_ids = itertools.count(1)
        self._calls: dict[int, WorkerCall] = {}
        self._outbox = GenerateManyRequest()
        self._has_work = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    @property
    def num_calls(self) -> int:
        return len(self._calls)

    def start(self, request: GenerateRequest, timeout_seconds: float, sink: ResponseSink) -> WorkerCall:
        """Close the call in the end, however it ends."""
        call_id = next(self._call_ids)
        call = self._calls[call_id] = WorkerCall(self, call_id, timeout_seconds, sink)
        self._outbox.starts.append(
            GenerateCall(
                call_id=call_id,
                request=request,
                timeout_ms=int(timeout_seconds * 1e3),
                metadata=dict(outgoing_metadata()),
            )
        )
        self._wake()
        return call

    def forget(self, call_id: int, *, is_over: bool) -> None:
        """Nobody reads the call any more; the worker is told unless it ended the call itself."""
        is_known = self._calls.pop(call_id, None) is not None
        if is_known and not is_over:
            self._outbox.cancelled_call_ids.append(call_id)
            self._wake()

    async def close(self) -> None:
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait({self._pump})

    def _wake(self) -> None:
        self._has_work.set()
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())

    async def _run(self) -> None:
        stream = self._stub.GenerateMany()
        writer = asyncio.create_task(self._write(stream))
        reason: Callable[[], ServiceError] = connection_lost
        try:
            async for message in stream:
                for response in message.calls:
                    if call := self._calls.get(response.call_id):
                        call.deliver(response)
        except grpc.aio.AioRpcError as failure:
            reason = partial(self._explain, failure)
        finally:
            writer.cancel()
            stream.cancel()
            self._fail(reason)

    async def _write(self, stream: Stream) -> None:
        """Ends with the stream, whose reader knows why."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._has_work.wait()
                self._has_work.clear()
                message, self._outbox = self._outbox, GenerateManyRequest()
                await stream.write(message)

    def _fail(self, reason: Callable[[], ServiceError]) -> None:
        """Every call gets an error of its own."""
        calls, self._calls, self._outbox = self._calls, {}, GenerateManyRequest()
        self._has_work.clear()
        for call in calls.values():
            call.fail(reason())


class WorkerCall:
    """One completion's call. Its sink hears of the end once."""

    def __init__(
        self, stream: WorkerStream, call_id: int, timeout_seconds: float, sink: ResponseSink
    ) -> None:
        self._stream = stream
        self._call_id = call_id
        self._sink = sink
        self._is_over = False
        self._is_failed = False
        deadline = DeadlineError("the request's time is up")
        self._timer = asyncio.get_running_loop().call_later(timeout_seconds, self.fail, deadline)

    def deliver(self, response: GenerateCallResponse) -> None:
        if self._is_failed:
            return
        for message in response.responses:
            self._sink.on_response(message)
        if response.HasField("end_status"):
            self._is_over = True
            status = status_pb2.Status.FromString(response.end_status)
            self._sink.on_end(from_status(status) if status.code else None)

    def fail(self, error: ServiceError) -> None:
        """Ends the call from this side, if it has not ended."""
        if not self._is_over and not self._is_failed:
            self._is_failed = True
            self._sink.on_end(error)

    def close(self) -> None:
        self._timer.cancel()
        self._stream.forget(self._call_id, is_over=self._is_over)
