"""Scheduler: the budget holds, blocks are where they should be, everyone gets a turn and ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_worker.config import SchedulerConfig
from gpu_worker.engine.block_manager import BlockManager
from gpu_worker.engine.scheduler import Scheduler
from gpu_worker.engine.sequence import Request, Sequence
from gpu_worker.engine.sequence_table import SequenceTable
from gpu_worker.sampling_params import SamplingParams

BLOCK_SIZE = 4
MAX_LEN = 24


class Bench:
    """A scheduler and what an engine around it would do: every sampled token is a 7."""

    def __init__(
        self, *, num_blocks: int = 16, max_num_seqs: int = 4, budget: int = 16, chunked: bool = True
    ):
        config = SchedulerConfig(max_num_seqs, budget, MAX_LEN, chunked)
        self.budget = budget
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self.table = SequenceTable(max_num_seqs, MAX_LEN, BLOCK_SIZE)
        self.scheduler = Scheduler(config, self.blocks, self.table, share_prefixes=True)
        self.live: list[Sequence] = []
        self.num_added = 0

    def add(self, prompt: list[int], max_tokens: int, arrival: float = 0.0) -> Sequence:
        self.num_added += 1
        total = min(MAX_LEN, len(prompt) + max_tokens)
        request = Request(str(self.num_added), prompt, SamplingParams(max_tokens=max_tokens))
        order = (arrival, self.num_added, 0)
        sequence = Sequence(request, 0, order, 0, total, (), np.array(prompt, np.int32))
        self.live.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.live.remove(sequence)

    def step(self) -> list[Sequence]:
        """The sequences that ended."""
        step = self.scheduler.schedule()
        assert 0 < step.num_tokens <= self.budget
        assert len(set(step.rows.tolist())) == len(step.rows)
        assert set(step.rows.tolist()) == set(self.table.rows.tolist())  # nobody who runs is left out
        self._check_writes(step)
        self.scheduler.commit(step)
        rows = step.sampled_rows
        lengths = self.table.num_tokens[rows]
        self.scheduler.reveal(rows, lengths, np.full(len(rows), 7))
        is_end = lengths >= self.table.max_total_tokens[rows]
        ended = [self.table.sequence(row) for row in rows[is_end].tolist()]
        for sequence in ended:
            self.remove(sequence)
        return ended

    def _check_writes(self, step) -> None:
        """Every new token has a slot of its own; a block is only shared if this step leaves it full."""
        table, slots = self.table, []
        for row, count in zip(step.rows.tolist(), step.num_scheduled.tolist(), strict=True):
            start = int(table.num_computed[row])
            for position in range(start, start + count):
                block = table.blocks_of(row)[position // BLOCK_SIZE]
                is_full = (position // BLOCK_SIZE + 1) * BLOCK_SIZE <= start + count
                assert is_full or self.blocks._ref_counts[block] == 1
                slots.append((block, position % BLOCK_SIZE))
        assert len(set(slots)) == len(slots)


class Schedules(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(MAX_LEN // BLOCK_SIZE, 16),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(5, 30),
        chunked=st.booleans(),
    )
    def start(self, num_blocks: int, max_num_seqs: int, budget: int, chunked: bool) -> None:
        budget = budget if chunked else max(budget, MAX_LEN)
        self.bench = Bench(num_blocks=num_blocks, max_num_seqs=max_num_seqs, budget=budget, chunked=chunked)

    @rule(prompt=st.lists(st.sampled_from([2, 3]), min_size=1, max_size=20), max_tokens=st.integers(1, 12))
    def add(self, prompt: list[int], max_tokens: int) -> None:
        self.bench.add(prompt, max_tokens, arrival=float(self.bench.num_added))

    @precondition(lambda self: self.bench.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.bench.remove(data.draw(st.sampled_from(self.bench.live)))

    @precondition(lambda self: self.bench.live)
    @rule()
    def step(self) -> None:
        first = min(self.bench.live, key=lambda sequence: sequence.order)
        was_running = first.row is not None
        self.bench.step()
        assert first.row is not None or not was_running or first not in self.bench.live  # never preempted

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "bench"):
            self.bench.scheduler.check_integrity()
            assert self.bench.scheduler.num_waiting + len(self.bench.table) == len(self.bench.live)

    def teardown(self) -> None:
        """Everyone ends, in a number of steps that their lengths bound."""
        if not hasattr(self, "bench"):
            return
        bound = 10 + sum(40 for _ in self.bench.live)
        while self.bench.live:
            self.bench.step()
            bound -= 1
            assert bound, "a sequence starves"
        assert self.bench.blocks.num_used == 0


Schedules.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSchedules = Schedules.TestCase


def test_decodes_go_on_while_a_long_prompt_is_cut_in_chunks():
    bench = Bench(budget=6)
    short = bench.add([2], 12)
    bench.step()
    long = bench.add([3] * 20, 2)
    for step in range(1, 5):
        bench.step()
        assert bench.table.num_tokens[short.row] == 2 + step
        assert bench.table.num_computed[long.row] == 5 * step


def test_whole_prompts_wait_for_a_step_that_holds_them():
    bench = Bench(budget=24, chunked=False)
    bench.add([2] * 20, 4)
    waits = bench.add([3] * 20, 4)
    bench.step()
    assert waits.row is None
    bench.step()
    assert waits.row is not None


def test_the_head_of_the_queue_is_not_jumped():
    bench = Bench(num_blocks=8)
    bench.add([2] * 16, 8)
    bench.step()
    large, small = bench.add([3] * 20, 4, arrival=1.0), bench.add([4], 1, arrival=2.0)
    bench.step()
    assert large.row is None
    assert small.row is None


def test_the_last_in_order_is_preempted_and_goes_on_later():
    bench = Bench(num_blocks=8)
    first, last = bench.add([2] * 12, 12, arrival=0.0), bench.add([3] * 12, 12, arrival=1.0)
    while bench.scheduler.num_preemptions == 0:
        bench.step()
    assert first.row is not None
    assert last.row is None
    generated = last.token_ids.tolist()
    assert generated[:12] == [3] * 12
    assert set(generated[12:]) == {7}
    while bench.live:
        bench.step()


@pytest.mark.parametrize("num_tokens", [1, 4, 5])
def test_blocks_for(num_tokens):
    assert BlockManager(2, 4).blocks_for(num_tokens) == (num_tokens + 3) // 4


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.floats(0, 20), st.integers(1, 20), st.integers(1, 8)), min_size=2, max_size=14
    ),
    num_blocks=st.integers(MAX_LEN // BLOCK_SIZE, 14),
    max_num_seqs=st.integers(1, 3),
)
def test_nobody_is_overtaken_by_one_who_is_later_in_order(arrivals, num_blocks, max_num_seqs):
    """So only those who come within the time that a priority is worth can go before: nobody starves."""
    bench = Bench(num_blocks=num_blocks, max_num_seqs=max_num_seqs)
    left = sorted(arrivals)
    step = 0
    while left or bench.live:
        while left and left[0][0] <= step:
            arrival, prompt_len, max_tokens = left.pop(0)
            # Some bring a priority: their order is not that of their coming.
            bench.add([2] * prompt_len, max_tokens, arrival=arrival - 5.0 * (prompt_len % 3))
        if bench.live:
            was_waiting = [sequence for sequence in bench.live if sequence.row is None]
            bench.step()
            begun = [
                sequence for sequence in was_waiting if sequence.row is not None or sequence not in bench.live
            ]
            still = [sequence for sequence in was_waiting if sequence not in begun]
            assert all(one.order < other.order for one in begun for other in still)
        step += 1
        assert step < 2000
