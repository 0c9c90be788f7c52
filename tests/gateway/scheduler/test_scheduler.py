"""The scheduler as a state machine: whatever happens in whatever order, its promises hold."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from gateway.scheduler.scheduler import Scheduler, SchedulerConfig, State, Ticket, can_run
from gateway.scheduler.workers import Worker
from protos.rpc.errors import ServiceError
from protos.wint2.scheduler.v1.scheduler_pb2 import ScheduleRequest, WorkerLoad, WorkerRegistration

CONFIG = SchedulerConfig(
    max_waiting=6,
    max_waiting_tokens=900,
    queue_timeout_seconds=20,
    reconnect_grace_seconds=5,
    silence_seconds=3,
    lost_seconds=8,
    affinity_slack_tokens=100,
)


class SchedulerMachine(RuleBasedStateMachine):
    workers = Bundle("workers")
    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(CONFIG)
        self.now = 0.0
        self.count = 0

    @rule(
        target=workers,
        name=st.integers(0, 3),
        port=st.integers(0, 3),
        model=st.sampled_from("ab"),
        max_num_seqs=st.integers(1, 3),
        max_model_len=st.sampled_from([50, 100]),
    )
    def register(self, name: int, port: int, model: str, max_num_seqs: int, max_model_len: int) -> Worker:
        registration = WorkerRegistration(
            instance_id=f"w{name}",
            address=f"host:{port}",
            model=model,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )
        return self.scheduler.register(registration, self.now)

    @rule(worker=workers, is_serving=st.booleans())
    def report(self, worker: Worker, is_serving: bool) -> None:
        self.scheduler.report(worker, WorkerLoad(is_serving=is_serving), self.now)

    @rule(worker=consumes(workers))
    def leave(self, worker: Worker) -> None:
        self.scheduler.unregister(worker, self.now)

    @rule(
        target=tickets,
        model=st.sampled_from(["a", "b", "c", ""]),
        prompt_tokens=st.integers(1, 110),
        max_tokens=st.integers(0, 20),
        priority=st.integers(-1, 1),
        affinity_key=st.none() | st.integers(0, 3),
        excluded=st.lists(st.sampled_from(["w0", "w1"]), max_size=2),
    )
    def submit(self, excluded: list[str], **fields: object) -> Ticket | None:
        self.count += 1
        request = ScheduleRequest(request_id=str(self.count), excluded_worker_ids=excluded, **fields)
        try:
            return self.scheduler.submit(request, self.now)
        except ServiceError:
            return None

    @rule(ticket=consumes(tickets))
    def withdraw(self, ticket: Ticket | None) -> None:
        if ticket is not None:
            self.scheduler.withdraw(ticket)
            assert ticket.state in (State.WITHDRAWN, State.FAILED)

    @rule(seconds=st.sampled_from([0.5, 2.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def promises(self) -> None:
        changed = self.scheduler.advance(self.now)
        self.scheduler.check_integrity()
        self._no_room_is_wasted()
        self._nobody_waits_for_ever()
        self._places_are_fit(changed)

    def _no_room_is_wasted(self) -> None:
        for worker in self.scheduler.workers.values():
            if worker.has_room and self.scheduler.is_serving(worker, self.now):
                assert not [ticket for ticket in self.scheduler.waiting if can_run(worker, ticket)]

    def _nobody_waits_for_ever(self) -> None:
        for ticket in self.scheduler.waiting:
            assert self.now - ticket.submitted_at < CONFIG.queue_timeout_seconds

    def _places_are_fit(self, changed: list[Ticket]) -> None:
        for ticket in changed:
            if ticket.state is State.PLACED:
                assert ticket.worker is not None
                assert can_run(ticket.worker, ticket)
                assert self.scheduler.workers[ticket.worker.worker_id] is ticket.worker
            else:
                assert ticket.state is State.FAILED
                assert ticket.error is not None


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
