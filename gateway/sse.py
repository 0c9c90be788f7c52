"""Server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.deadline import StallWatch
from protos.rpc.errors import CancelledError, DeadlineError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


def sse(data: Any) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` ends with; it is cancelled, and CancelledError raised, when the client leaves first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise CancelledError("the client closed the connection")
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.wait({task, watcher})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends what the generator yields up to DONE, at the client's pace; closes it when the client leaves.

    A client that reads nothing for `write_timeout` seconds is as good as gone.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], write_timeout: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._write_timeout = write_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._write(send))
        except (CancelledError, DeadlineError):
            scope["state"]["left"] = True

    async def _write(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            loop = asyncio.get_running_loop()
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with StallWatch(self._write_timeout) as watch:
                async for event in events:
                    watch.since = loop.time()
                    is_last = event.endswith(DONE)
                    await send({"type": "http.response.body", "body": event, "more_body": not is_last})
                    watch.since = None
