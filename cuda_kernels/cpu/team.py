"""The threads that share an operation's work, and how they meet.

A job is a compiled function that takes items until none is left. Every thread has a run of them of its own,
so that it reads weights one after another, and then takes what the others have left:

    5 threads, 20 items   0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15 | 16 17 18 19      the second is at 6,
                          x x . .   x x . .   x x  x x     x  x  .  .   x  x  .  .       the third helps it

Who starts jobs works too and waits only for threads that have begun: one that the operating system keeps away
costs nothing but its help. Between jobs the others look for the next one, give way to other programs after a
few microseconds, and sleep after some milliseconds: an idle server takes no time.

    state   OPEN      number of the jobs that may be joined, 0 if none
            ACTIVE    how many have joined
            BUSY      how many want the team: the second runs its jobs alone
            SIZE      how many threads there are
            LAST, JOBS, COUNT
    job     its function, the address of its arguments, of which the first is left to the team: the address of
            how many have come and how many items each run has lost, a cache line each
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.ccallback import CFunc

from cuda_kernels.cpu import vector as v
from cuda_kernels.cpu.caching import callback, compiled
from cuda_kernels.cpu.vector import I64, Builder, Value, keep

# Bytes apart, so that nobody's waiting slows another's writing.
_LINE = 128
_OPEN, _ACTIVE, _BUSY, _SIZE, _LAST, _JOBS, _COUNT = range(0, 7 * _LINE, _LINE)
_SPINS = 2000
_YIELDS = 20_000

_JOB_SIGNATURE = types.void(types.int64)


def _add(builder: Builder, address: Value, change: Value) -> Value:
    counter = builder.inttoptr(address, I64.as_pointer())
    return builder.atomic_rmw("add", counter, change, "seq_cst")


def _read(builder: Builder, address: Value) -> Value:
    return builder.load_atomic(builder.inttoptr(address, I64.as_pointer()), "seq_cst", 8, typ=I64)


def _write(builder: Builder, address: Value, value: Value) -> None:
    builder.store_atomic(value, builder.inttoptr(address, I64.as_pointer()), "seq_cst", 8)


def _call(builder: Builder, address: Value, argument: Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [I64])
    builder.call(builder.inttoptr(address, kind.as_pointer()), [argument])


def _yield(builder: Builder, address: Value) -> None:
    kind = ir.FunctionType(ir.IntType(32), [])
    builder.call(builder.inttoptr(address, kind.as_pointer()), [])


add, read, write = v.function(_add, 2), v.function(_read, 1), v.kernel(_write, 2)
_run_job, _give_way = v.kernel(_call, 2), v.kernel(_yield, 1)


@cache
def _compiled(job: Callable[[int], None]) -> CFunc:
    return callback(_JOB_SIGNATURE, job)


@cache
def address_of(job: Callable[[int], None]) -> int:
    """Where the compiled job is; its one argument is the address of what it needs."""
    address = _compiled(job).address
    assert address is not None
    return address


@compiled
def enter(arguments: int) -> tuple[int, int]:
    """The run of items that this thread begins with, and how many runs there are."""
    counters = read(arguments)
    num_runs = read(counters + 8)
    return add(counters, 1) % num_runs, num_runs


@compiled
def take(arguments: int, place: tuple[int, int], num_items: int) -> tuple[int, tuple[int, int]]:
    """The next item, `num_items` if none is left, and the place that the one after it is taken from."""
    index, num_runs = place
    counters = read(arguments)
    for _ in range(num_runs):
        item = index * num_items // num_runs + add(counters + (1 + index) * _LINE, 1)
        if item < (index + 1) * num_items // num_runs:
            return item, (index, num_runs)
        index = (index + 1) % num_runs
    return num_items, place


@compiled
def _work(jobs: int, count: int) -> None:
    """Those jobs one after another; nobody waits between them."""
    for index in range(count):
        _run_job(read(jobs + 16 * index), read(jobs + 16 * index + 8))


@compiled
def run(team: tuple[int, int], given: tuple[tuple[int, int], ...]) -> None:
    """Have the team (0: nobody else) do jobs, each with the address of its arguments; returns when done."""
    state, give_way = team
    size = read(state + _SIZE) if state else 1
    jobs, counters = (
        np.empty((len(given), 2), np.int64),
        np.zeros((len(given), 1 + size, _LINE // 8), np.int64),
    )
    for index, (job, arguments) in enumerate(given):
        jobs[index, 0], jobs[index, 1], counters[index, 0, 1] = job, arguments, size
        write(jobs[index, 1], counters[index].ctypes.data)
    if state and add(state + _BUSY, 1) == 0:
        number = read(state + _LAST) + 1
        write(state + _LAST, number)
        write(state + _JOBS, jobs.ctypes.data)
        write(state + _COUNT, len(jobs))
        write(state + _OPEN, number)
        _work(jobs.ctypes.data, len(jobs))
        write(state + _OPEN, 0)
        spins = 0
        while read(state + _ACTIVE) != 0:
            spins += 1
            if spins > _SPINS:
                _give_way(give_way)
    else:
        _work(jobs.ctypes.data, len(jobs))
    if state:
        add(state + _BUSY, -1)
    keep(counters)
    keep(jobs)


@compiled
def _help(state: int, give_way: int) -> None:
    """Join jobs until none has come for some milliseconds."""
    seen, idle = 0, 0
    while idle < _SPINS + _YIELDS:
        number = read(state + _OPEN)
        if number != 0 and number != seen:
            add(state + _ACTIVE, 1)
            if read(state + _OPEN) == number:
                _work(read(state + _JOBS), read(state + _COUNT))
            add(state + _ACTIVE, -1)
            seen, idle = number, 0
        else:
            idle += 1
            if idle > _SPINS:
                _give_way(give_way)


class Team:
    """Helpers of the thread that computes; `handle` is what compiled code needs."""

    def __init__(self, num_threads: int) -> None:
        self._state = np.zeros(7 * _LINE // 8 if num_threads > 1 else 0, np.int64)
        give_way = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
        self.handle = (self._state.ctypes.data if num_threads > 1 else 0), give_way
        if num_threads > 1:
            self._state[_SIZE // 8] = num_threads
        self._alarms = [threading.Event() for _ in range(num_threads - 1)]
        for index, alarm in enumerate(self._alarms):
            name = f"cpu-{index + 1}"
            threading.Thread(target=self._serve, args=(alarm,), name=name, daemon=True).start()

    def awake(self) -> tuple[int, int]:
        """`handle`, after waking those who sleep."""
        for alarm in self._alarms:
            if not alarm.is_set():
                alarm.set()
        return self.handle

    def _serve(self, alarm: threading.Event) -> None:
        while True:
            alarm.wait()
            _help(*self.handle)
            alarm.clear()


@cache
def team_of(num_threads: int) -> Team:
    return Team(num_threads)
