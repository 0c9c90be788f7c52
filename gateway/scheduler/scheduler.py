"""Which request runs on which worker, and which waits: the whole state, with no clock and no I/O of its own.

    submit ──► WAITING ──advance──► PLACED ──withdraw──► gone
                  └─────advance──► FAILED  (queue timeout; its model has no worker and none comes back)
                                   PLACED ──advance──► FAILED  (its worker fell silent for too long)

A model is *expected* while a worker of it is registered, or left less than `reconnect_grace_seconds` ago:
requests for an expected model wait, requests for any other model are refused at once.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from gateway.scheduler.workers import Worker, choose, num_tokens
from protos.rpc.errors import (
    ContextLengthError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    ServiceError,
    UnavailableError,
)
from protos.wint2.scheduler.v1.scheduler_pb2 import ScheduleRequest, WorkerLoad, WorkerRegistration


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of the queue, and when a worker counts as gone."""

    max_waiting: int = 1024
    max_waiting_tokens: int = 8_000_000
    queue_timeout_seconds: float = 60.0
    reconnect_grace_seconds: float = 10.0
    silence_seconds: float = 3.0  # without a load report for so long a worker gets no new requests
    lost_seconds: float = 10.0  # and for so long its running requests are given up too
    affinity_slack_tokens: int = 4096


class State(Enum):
    WAITING = auto()
    PLACED = auto()
    FAILED = auto()
    WITHDRAWN = auto()


@dataclass(eq=False, slots=True)
class Ticket:
    """A request's standing. `worker` is set once placed, `error` once failed."""

    request: ScheduleRequest
    model: str
    order: tuple[int, int]
    submitted_at: float
    state: State = State.WAITING
    worker: Worker | None = None
    error: ServiceError | None = None


class Scheduler:
    """Callers pass the time in seconds; `advance` is called after every change and now and then."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.workers: dict[str, Worker] = {}
        self.waiting: list[Ticket] = []
        self.tickets: dict[str, Ticket] = {}  # waiting and placed, by request id
        self._departed: dict[str, Worker] = {}
        self._arrivals = itertools.count()
        self._num_waiting_tokens = 0

    # Workers come and go.

    def register(self, registration: WorkerRegistration, now: float) -> Worker:
        """Lists the worker, in place of an earlier one at its address or of its own earlier self."""
        worker = Worker(registration, now)
        for other in list(self.workers.values()):
            if other.registration.address == registration.address or other.worker_id == worker.worker_id:
                self.unregister(other, now)
        previous = self._departed.pop(worker.worker_id, None)
        if previous is not None:
            worker.inherit(previous)
            for ticket in self._placed_on(worker):
                ticket.worker = worker
        self.workers[worker.worker_id] = worker
        return worker

    def report(self, worker: Worker, load: WorkerLoad, now: float) -> None:
        worker.load, worker.seen_at = load, now

    def unregister(self, worker: Worker, now: float) -> None:
        """Takes the worker off the list; what runs on it may finish. No-op if another took its place."""
        if self.workers.get(worker.worker_id) is worker:
            del self.workers[worker.worker_id]
            worker.seen_at = now
            self._departed[worker.worker_id] = worker

    # Requests come and go.

    def submit(self, request: ScheduleRequest, now: float) -> Ticket:
        """Puts the request in the queue, or raises: unknown model, too long, queue full, no worker."""
        if request.request_id in self.tickets:
            raise InvalidArgumentError(f"request id {request.request_id!r} is in use", field="request_id")
        model = self._resolve_model(request.model)
        self._check_length(request, model)
        if not self._has_place(now):
            self._check_room(request)
        ticket = Ticket(request, model, (request.priority, next(self._arrivals)), now)
        self.tickets[request.request_id] = ticket
        bisect.insort(self.waiting, ticket, key=lambda waiting: waiting.order)
        self._num_waiting_tokens += num_tokens(request)
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Forgets the request, wherever it stands."""
        if ticket.state is State.WAITING:
            self._leave_queue(ticket)
        elif ticket.state is State.PLACED:
            self._leave_worker(ticket)
        else:
            return
        del self.tickets[ticket.request.request_id]
        ticket.state = State.WITHDRAWN

    def num_ahead(self, ticket: Ticket) -> int:
        return bisect.bisect_left(self.waiting, ticket.order, key=lambda waiting: waiting.order)

    def advance(self, now: float) -> list[Ticket]:
        """Places and fails what can be placed and must be failed; returns the tickets that changed."""
        for worker_id, worker in list(self._departed.items()):
            if worker.is_silent(now, self.config.reconnect_grace_seconds):
                del self._departed[worker_id]
        return [*self._give_up_lost(now), *self._place(now), *self._expire(now)]

    def models(self) -> list[str]:
        """Names of the expected models."""
        return sorted({worker.registration.model for worker in self._expected()})

    def is_serving(self, worker: Worker, now: float) -> bool:
        return worker.load.is_serving and not worker.is_silent(now, self.config.silence_seconds)

    def _expected(self) -> Iterator[Worker]:
        return itertools.chain(self.workers.values(), self._departed.values())

    def _resolve_model(self, name: str) -> str:
        models = self.models()
        if not models:
            raise UnavailableError("no worker is connected yet", reason="NO_WORKER", retry_after_seconds=5)
        if not name and len(models) == 1:
            return models[0]
        known = ", ".join(models)
        if not name:
            raise InvalidArgumentError(f"say which model: {known}", field="model")
        if name not in models:
            raise NotFoundError(
                f"The model {name!r:.200} does not exist; there is: {known}",
                field="model",
                reason="MODEL_NOT_FOUND",
            )
        return name

    @property
    def num_placed(self) -> int:
        return len(self.tickets) - len(self.waiting)

    def _check_length(self, request: ScheduleRequest, model: str) -> None:
        lengths = (
            worker.registration.max_model_len
            for worker in self._expected()
            if worker.registration.model == model
        )
        longest = max(lengths)
        wanted = request.prompt_tokens + max(request.max_tokens, 1)
        if wanted > longest:
            completion = wanted - request.prompt_tokens
            raise ContextLengthError(
                f"This model's maximum context length is {longest} tokens. However, you requested {wanted} "
                f"tokens ({request.prompt_tokens} in the prompt, {completion} in the completion).",
                field="prompt",
                metadata={"max_model_len": str(longest), "prompt_tokens": str(request.prompt_tokens)},
            )

    def _has_place(self, now: float) -> bool:
        """Whether a request need not wait."""
        serving = (worker for worker in self.workers.values() if self.is_serving(worker, now))
        return not self.waiting and any(worker.has_room for worker in serving)

    def _check_room(self, request: ScheduleRequest) -> None:
        config, tokens = self.config, self._num_waiting_tokens + num_tokens(request)
        if len(self.waiting) >= config.max_waiting:
            full = f"the queue is full: {len(self.waiting)} of {config.max_waiting} requests wait"
        elif self.waiting and tokens > config.max_waiting_tokens:
            full = f"the queue is full: {tokens} of {config.max_waiting_tokens} tokens would wait"
        else:
            return
        raise OverloadedError(full, reason="QUEUE_FULL", retry_after_seconds=1)

    def _place(self, now: float) -> list[Ticket]:
        serving = [worker for worker in self.workers.values() if self.is_serving(worker, now)]
        changed = []
        for ticket in list(self.waiting):
            if not any(worker.has_room for worker in serving):
                break
            candidates = [worker for worker in serving if worker.has_room and can_run(worker, ticket)]
            if candidates:
                self._leave_queue(ticket)
                self._enter_worker(
                    ticket, choose(ticket.request, candidates, self.config.affinity_slack_tokens)
                )
                changed.append(ticket)
        return changed

    def _expire(self, now: float) -> list[Ticket]:
        failed = []
        for ticket in list(self.waiting):
            error = self._reason_to_fail(ticket, now)
            if error is not None:
                self._fail(ticket, error)
                failed.append(ticket)
        return failed

    def _reason_to_fail(self, ticket: Ticket, now: float) -> ServiceError | None:
        waited = now - ticket.submitted_at
        if waited >= self.config.queue_timeout_seconds:
            message = f"waited {waited:.1f} s for a worker, the limit of the queue"
            return UnavailableError(message, reason="QUEUE_TIMEOUT", retry_after_seconds=5)
        if waited < self.config.reconnect_grace_seconds or any(
            can_run(worker, ticket) and self.is_serving(worker, now) for worker in self.workers.values()
        ):
            return None
        message = f"no worker serves the model {ticket.model!r} now"
        return UnavailableError(message, reason="NO_WORKER", retry_after_seconds=5)

    def _give_up_lost(self, now: float) -> list[Ticket]:
        lost = []
        for worker in self.workers.values():
            if worker.placed and worker.is_silent(now, self.config.lost_seconds):
                silence = f"the worker said nothing for {now - worker.seen_at:.1f} s"
                for ticket in self._placed_on(worker):
                    self._fail(ticket, UnavailableError(silence, reason="WORKER_LOST", retry_after_seconds=5))
                    lost.append(ticket)
        return lost

    def _placed_on(self, worker: Worker) -> list[Ticket]:
        return [self.tickets[request_id] for request_id in worker.placed]

    def _fail(self, ticket: Ticket, error: ServiceError) -> None:
        self.withdraw(ticket)
        ticket.state, ticket.error = State.FAILED, error

    def _leave_queue(self, ticket: Ticket) -> None:
        del self.waiting[self.num_ahead(ticket)]
        self._num_waiting_tokens -= num_tokens(ticket.request)

    def _enter_worker(self, ticket: Ticket, worker: Worker) -> None:
        worker.place(ticket.request)
        ticket.state, ticket.worker = State.PLACED, worker

    def _leave_worker(self, ticket: Ticket) -> None:
        assert ticket.worker is not None
        ticket.worker.release(ticket.request.request_id)

    def check_integrity(self) -> None:
        """Asserts what must hold between any two calls."""
        assert self.waiting == sorted(self.waiting, key=lambda ticket: ticket.order)
        assert all(ticket.state is State.WAITING for ticket in self.waiting)
        assert self._num_waiting_tokens == sum(num_tokens(ticket.request) for ticket in self.waiting)
        assert len(self.waiting) <= self.config.max_waiting
        for worker in self._expected():
            assert worker.num_placed_tokens == sum(worker.placed.values())
        for request_id, ticket in self.tickets.items():
            if ticket.state is State.PLACED:
                assert ticket.worker is not None
                assert ticket.worker.placed[request_id] == num_tokens(ticket.request)
            else:
                assert ticket in self.waiting


def can_run(worker: Worker, ticket: Ticket) -> bool:
    """Whether the worker serves the request's model, fits its length, and has not failed it before."""
    return (
        worker.registration.model == ticket.model
        and worker.fits(ticket.request)
        and worker.worker_id not in ticket.request.excluded_worker_ids
    )
