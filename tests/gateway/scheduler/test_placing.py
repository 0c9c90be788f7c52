"""Whom the scheduler chooses, whom it lets go first, and what it says to the rest."""

from __future__ import annotations

import pytest

from gateway.scheduler.scheduler import Scheduler, SchedulerConfig, State, Ticket
from gateway.scheduler.workers import Worker
from protos.rpc.errors import (
    ContextLengthError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from protos.wint2.scheduler.v1.scheduler_pb2 import ScheduleRequest, WorkerLoad, WorkerRegistration


def join(
    scheduler: Scheduler, name: str, *, model: str = "m", max_num_seqs: int = 4, now: float = 0
) -> Worker:
    worker = scheduler.register(
        WorkerRegistration(
            instance_id=name, address=name, model=model, max_num_seqs=max_num_seqs, max_model_len=1000
        ),
        now,
    )
    scheduler.report(worker, WorkerLoad(is_serving=True), now)
    return worker


def ask(scheduler: Scheduler, name: str, tokens: int = 10, now: float = 0, **fields: object) -> Ticket:
    request = ScheduleRequest(request_id=name, prompt_tokens=tokens, max_tokens=10, **fields)
    ticket = scheduler.submit(request, now)
    scheduler.advance(now)
    return ticket


def place_of(ticket: Ticket) -> str:
    assert ticket.worker is not None
    return ticket.worker.worker_id


def test_fewest_outstanding_tokens() -> None:
    scheduler = Scheduler(SchedulerConfig())
    join(scheduler, "a"), join(scheduler, "b")
    assert place_of(ask(scheduler, "long", 500)) == "a"
    assert [place_of(ask(scheduler, str(i))) for i in range(3)] == ["b", "b", "b"]


def test_equal_prefixes_meet_until_their_worker_is_much_busier() -> None:
    scheduler = Scheduler(SchedulerConfig(affinity_slack_tokens=100))
    for name in "abcd":
        join(scheduler, name, max_num_seqs=100)
    places = [place_of(ask(scheduler, str(i), affinity_key=7)) for i in range(6)]
    assert len(set(places)) == 1
    assert {place_of(ask(scheduler, f"x{i}", affinity_key=7)) for i in range(6)} != {places[0]}


def test_affinity_outlives_other_workers() -> None:
    scheduler = Scheduler(SchedulerConfig())
    workers = {name: join(scheduler, name, max_num_seqs=100) for name in "abcd"}
    liked = {key: place_of(ask(scheduler, f"first{key}", affinity_key=key)) for key in range(8)}
    gone = liked[0]
    scheduler.unregister(workers[gone], 0)
    for key, name in liked.items():
        moved = place_of(ask(scheduler, f"again{key}", affinity_key=key))
        assert moved == name if name != gone else moved != name


def test_priority_then_arrival() -> None:
    scheduler = Scheduler(SchedulerConfig())
    join(scheduler, "a", max_num_seqs=1)
    running = [ask(scheduler, "r0"), ask(scheduler, "r1")]
    ask(scheduler, "late"), ask(scheduler, "urgent", priority=-1), ask(scheduler, "later")
    assert [ticket.request.request_id for ticket in scheduler.waiting] == ["urgent", "late", "later"]
    scheduler.withdraw(running[0])
    [placed] = scheduler.advance(0)
    assert placed.request.request_id == "urgent"


def test_refusals_say_why() -> None:
    scheduler = Scheduler(SchedulerConfig(max_waiting=0))
    with pytest.raises(UnavailableError, match="no worker"):
        ask(scheduler, "x")
    join(scheduler, "a", model="m1")
    with pytest.raises(NotFoundError, match="m1"):
        ask(scheduler, "x", model="m2")
    with pytest.raises(ContextLengthError, match=r"1000 tokens\. However, you requested 1009"):
        ask(scheduler, "x", tokens=999)
    while scheduler.workers["a"].has_room:
        ask(scheduler, f"placed {len(scheduler.tickets)}")
    with pytest.raises(OverloadedError, match="0 of 0"):
        ask(scheduler, "x")
    join(scheduler, "b", model="m2")
    with pytest.raises(InvalidArgumentError, match="m1, m2"):
        ask(scheduler, "x")


def test_a_silent_worker_gets_nothing_and_loses_what_it_had() -> None:
    scheduler = Scheduler(SchedulerConfig(silence_seconds=3, lost_seconds=10))
    worker = join(scheduler, "a")
    running = ask(scheduler, "running")
    waiting = ask(scheduler, "waiting", now=4)
    assert waiting.state is State.WAITING
    assert running.state is State.PLACED
    scheduler.advance(11)
    assert running.error is not None
    assert running.error.reason == "WORKER_LOST"
    scheduler.report(worker, WorkerLoad(is_serving=True), 12)
    assert scheduler.advance(12) == [waiting]


def test_a_worker_that_registers_again_keeps_what_runs_on_it() -> None:
    scheduler = Scheduler(SchedulerConfig())
    first = join(scheduler, "a")
    running = ask(scheduler, "running")
    scheduler.unregister(first, 0)
    second = join(scheduler, "a", now=1)
    assert running.worker is second
    assert second.num_placed_tokens == 20
    scheduler.unregister(first, 2)  # the old stream ends late
    assert scheduler.workers == {"a": second}
    scheduler.withdraw(running)
    assert second.num_placed_tokens == 0
