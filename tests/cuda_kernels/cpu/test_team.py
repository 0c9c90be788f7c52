"""The team does every item once, whoever helps and however many want it at a time."""

import threading
import time

import numba
import numpy as np
import pytest
from numba.np.numpy_support import carray

from cuda_kernels.cpu.team import Team, address_of, enter, run, take
from cuda_kernels.cpu.vector import pointer

NUM_ITEMS = 1000


def count_items(arguments: int) -> None:
    given = carray(pointer(arguments), (1 + NUM_ITEMS,), np.int64)
    item, place = take(arguments, enter(arguments), NUM_ITEMS)
    while item < NUM_ITEMS:
        given[1 + item] += 1
        item, place = take(arguments, place, NUM_ITEMS)


@numba.njit(nogil=True)
def start(team, jobs):
    run(team, jobs)


def do(team):
    """How often each item was done, of two jobs of which nobody waits for the first."""
    given = np.zeros((2, 1 + NUM_ITEMS), np.int64)
    start(team.awake(), tuple((address_of(count_items), row.ctypes.data) for row in given))
    return given[:, 1:]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_every_item_is_done_once(num_threads):
    team = Team(num_threads)
    assert all((do(team) == 1).all() for _ in range(200))


def test_who_finds_the_team_at_work_works_alone():
    team, wrong = Team(3), []

    def work():
        wrong.extend(done for done in (do(team) for _ in range(200)) if not (done == 1).all())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_idle_helpers_sleep_and_are_woken():
    team = Team(3)
    do(team)
    deadline = time.monotonic() + 200  # they give way thousands of times first, to whatever else runs here
    while any(alarm.is_set() for alarm in team._alarms):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (do(team) == 1).all()
