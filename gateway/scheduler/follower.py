"""Workers that did not register here, in a dispatcher of this process.

They registered with another gateway process, or are a fixed list. Of several processes with the same workers
each places by what it placed itself; together they may place more on a worker than it runs at once, and the
rest waits inside the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from gateway.scheduler.dispatcher import Dispatcher
from gateway.scheduler.static import StaticWorkers
from gateway.scheduler.workers import Worker
from protos.rpc.errors import ServiceError
from protos.rpc.security import Security
from protos.wint2.scheduler.v1 import scheduler_pb2 as pb

POLL_SECONDS = 0.2

ListWorkers = Callable[[], Awaitable[Sequence[pb.Worker]]]


class Follower:
    """Keeps a dispatcher's workers as `list_workers` tells them."""

    def __init__(self, dispatcher: Dispatcher, list_workers: ListWorkers) -> None:
        self._dispatcher = dispatcher
        self._list_workers = list_workers
        self._known: dict[str, Worker] = {}

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _run(self) -> None:
        while True:
            # Workers of which nothing is heard fall silent by themselves.
            with contextlib.suppress(ServiceError):
                self.update(await self._list_workers())
            await asyncio.sleep(POLL_SECONDS)

    def update(self, listed: Sequence[pb.Worker]) -> None:
        for worker in listed:
            if worker.worker_id not in self._known:
                self._known[worker.worker_id] = self._dispatcher.register(worker.registration)
            self._dispatcher.report(self._known[worker.worker_id], worker.load)
        for worker_id in self._known.keys() - {worker.worker_id for worker in listed}:
            self._dispatcher.unregister(self._known.pop(worker_id))


@contextlib.asynccontextmanager
async def static_workers(
    targets: Sequence[str], dispatcher: Dispatcher, security: Security
) -> AsyncIterator[None]:
    """Lists the workers at `targets` in the dispatcher while this is open."""
    if not targets:
        yield
        return
    workers = StaticWorkers(targets, security)
    try:
        async with Follower(dispatcher, workers.list_workers).following():
            yield
    finally:
        await workers.close()
