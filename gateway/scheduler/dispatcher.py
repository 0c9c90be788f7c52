"""The scheduler on an event loop: requests await their place, workers come and go, time passes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from gateway.scheduler.scheduler import Scheduler, State, Ticket
from gateway.scheduler.workers import Worker, num_tokens
from protos.rpc.errors import ServiceError
from protos.wint2.scheduler.v1 import scheduler_pb2 as pb

TICK_SECONDS = 0.2

T = TypeVar("T")


class Place:
    """A request's standing, awaitable: `placed` ends with the worker, `lost` when it has to be given up.

    Both end with an error as their result, never as their exception, so that nobody has to look.
    """

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.placed: asyncio.Future[pb.Placed | ServiceError] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[ServiceError] = asyncio.get_running_loop().create_future()

    def settle(self) -> None:
        """Passes the ticket's new state on to whoever waits."""
        if self.ticket.error is not None:
            _set_once(self.placed, self.ticket.error)
            _set_once(self.lost, self.ticket.error)
        elif self.ticket.state is State.PLACED and self.ticket.worker is not None:
            _set_once(self.placed, _placed(self.ticket.worker))

    async def wait_placed(self) -> pb.Placed:
        """The worker, once there is room on one; raises what `Scheduler` failed the request with."""
        outcome = await asyncio.shield(self.placed)
        if isinstance(outcome, ServiceError):
            raise outcome
        return outcome


class Dispatcher:
    """Owns a Scheduler; everything here runs on one event loop."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._places: dict[str, Place] = {}
        self._wall_clock_offset = time.time() - clock()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Lets time pass for the queue: timeouts and silent workers are noticed while this is open."""
        ticker = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            ticker.cancel()
            await asyncio.wait({ticker})

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._advance()

    def register(self, registration: pb.WorkerRegistration) -> Worker:
        return self._scheduler.register(registration, self._clock())

    def report(self, worker: Worker, load: pb.WorkerLoad) -> None:
        self._scheduler.report(worker, load, self._clock())
        self._advance()

    def unregister(self, worker: Worker) -> None:
        self._scheduler.unregister(worker, self._clock())
        self._advance()

    def submit(self, request: pb.ScheduleRequest) -> Place:
        """Queues the request, or raises as `Scheduler.submit` does. `withdraw` ends every place."""
        place = Place(self._scheduler.submit(request, self._clock()))
        self._places[request.request_id] = place
        self._advance()
        return place

    def withdraw(self, place: Place) -> None:
        if self._places.pop(place.ticket.request.request_id, None) is not None:
            self._scheduler.withdraw(place.ticket)
            self._advance()

    def num_ahead(self, place: Place) -> int:
        return self._scheduler.num_ahead(place.ticket)

    def list_workers(self) -> list[pb.Worker]:
        """A silent worker is shown as not serving."""
        return [self._describe(worker) for worker in self._scheduler.workers.values()]

    def queue(self) -> pb.GetQueueResponse:
        now = self._clock()
        waiting = [
            pb.QueuedRequest(
                request_id=ticket.request.request_id,
                model=ticket.model,
                priority=ticket.request.priority,
                num_tokens=num_tokens(ticket.request),
                waiting_ms=int((now - ticket.submitted_at) * 1000),
            )
            for ticket in self._scheduler.waiting
        ]
        return pb.GetQueueResponse(
            waiting=waiting,
            num_placed=self._scheduler.num_placed,
            max_waiting=self._scheduler.config.max_waiting,
        )

    def _advance(self) -> None:
        for ticket in self._scheduler.advance(self._clock()):
            place = self._places.get(ticket.request.request_id)
            if place is not None:
                place.settle()

    def _describe(self, worker: Worker) -> pb.Worker:
        described = pb.Worker(
            worker_id=worker.worker_id,
            registration=worker.registration,
            load=worker.load,
            num_placed=len(worker.placed),
            num_placed_tokens=worker.num_placed_tokens,
        )
        described.load.is_serving = self._scheduler.is_serving(worker, self._clock())
        described.load_time.FromMilliseconds(int((worker.seen_at + self._wall_clock_offset) * 1000))
        return described


def _placed(worker: Worker) -> pb.Placed:
    return pb.Placed(
        worker_id=worker.worker_id,
        address=worker.registration.address,
        max_model_len=worker.registration.max_model_len,
        eos_token_ids=worker.registration.eos_token_ids,
    )


def _set_once(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)
