"""Chooses which tokens of which sequences the next step computes.

Every step first serves the running sequences: one token to each that decodes, then prompt chunks in order of
arrival; what is left of the token budget admits waiting ones. A waiting sequence is admitted when the blocks
of all its tokens are free, so a prefill, once begun, ends. When a decoding sequence finds no free block, the
youngest running one is preempted: it gives up its blocks and waits, and later recomputes what the prefix
cache no longer holds.

Sequences are served in order of `arrival_time + priority * priority_seconds`, which never changes. So only
those who arrive within that time can overtake: no priority starves another, and the first in order advances.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from gpu_worker.config import SchedulerConfig
from gpu_worker.engine.block_manager import BlockManager, hash_block
from gpu_worker.engine.sequence import Sequence
from gpu_worker.engine.sequence_table import Rows, SequenceTable


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """The rows that take part, and the tokens each computes; who has none left after them is sampled."""

    rows: Rows
    num_scheduled: Rows
    is_sampled: NDArray[np.bool_]
    admitted: list[Sequence]
    copies: list[tuple[int, int]]  # blocks whose content is needed in another one before the step: from, to

    @property
    def num_tokens(self) -> int:
        return int(self.num_scheduled.sum())

    @property
    def sampled_rows(self) -> Rows:
        return self.rows[self.is_sampled]


class Scheduler:
    """Owns the waiting queue, and moves sequences between it and the table of running ones."""

    def __init__(
        self, config: SchedulerConfig, blocks: BlockManager, table: SequenceTable, *, share_prefixes: bool
    ) -> None:
        self._config = config
        self._blocks = blocks
        self._table = table
        self._share_prefixes = share_prefixes
        self._waiting: list[Sequence] = []
        self._copies: list[tuple[int, int]] = []
        self.num_preemptions = 0
        self.num_lookup_tokens = 0
        self.num_hit_tokens = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_pending_prefill_tokens(self) -> int:
        """Tokens that must be computed before their sequences can go on."""
        rows = self._table.rows
        left = self._table.num_tokens[rows] - self._table.num_computed[rows]
        return int(left[left > 1].sum()) + sum(sequence.num_tokens for sequence in self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in the queue, at its place."""
        insort(self._waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out of wherever it is, if anywhere; its blocks are free at once."""
        if sequence.row is not None:
            self._blocks.release(self._table.detach(sequence))
            return
        place = bisect_left(self._waiting, sequence.order, key=_order)
        if self._waiting[place : place + 1] == [sequence]:
            del self._waiting[place]

    def schedule(self) -> ScheduledStep:
        """Plans a step of at most `max_num_batched_tokens` tokens. It has no rows when there is no work."""
        self._copies = []
        self._grow_tables()
        table = self._table
        rows = table.unfinished_rows
        granted = self._grant(rows)
        self._register_filled(rows, granted)
        admitted = list(self._admit(self._config.max_num_batched_tokens - int(granted.sum())))
        newcomers = table.sequences[len(table) - len(admitted) :]
        if admitted:
            rows = np.append(rows, table.rows[len(table) - len(admitted) :])
            granted = np.append(granted, np.array(admitted, np.int64))
        is_sampled = table.num_computed[rows] + granted == table.num_tokens[rows]
        return ScheduledStep(rows, granted, is_sampled, newcomers, self._copies)

    @property
    def can_grow(self) -> bool:
        """Whether every running sequence can go on without another's being preempted."""
        return len(self._table.rows_short_of_blocks()) <= self._blocks.num_free

    def commit(self, step: ScheduledStep) -> None:
        """Counts a step's tokens as computed, and those it samples as there."""
        self._table.num_computed[step.rows] += step.num_scheduled
        self._table.append_unknown(step.sampled_rows)

    def reveal(self, rows: Rows, lengths: Rows, token_ids: Rows) -> None:
        """Takes the tokens that brought the rows to these lengths; registers blocks that waited for them."""
        table = self._table
        table.reveal(rows, lengths, token_ids)
        is_filled = (lengths % table.block_size == 0) & (table.num_computed[rows] >= lengths)
        for i in np.flatnonzero(is_filled).tolist():
            end = int(lengths[i]) // table.block_size
            self._register(int(rows[i]), end - 1, end)

    def check_integrity(self) -> None:
        """Asserts that blocks, tables and queue agree."""
        table = self._table
        self._blocks.check_integrity([table.blocks_of(row) for row in table.rows.tolist()])
        rows = table.rows
        assert (table.num_computed[rows] < table.num_tokens[rows]).all()
        assert (table.num_computed[rows] <= table.num_blocks[rows] * table.block_size).all()
        assert all(table.sequence(row).row == row for row in rows.tolist())
        assert all(sequence.row is None for sequence in self._waiting)
        assert self._waiting == sorted(self._waiting, key=_order)

    def _grant(self, rows: Rows) -> Rows:
        """Shares the budget: one token to each decoding row, the rest to prefilling ones, oldest first."""
        wanted = self._table.num_tokens[rows] - self._table.num_computed[rows]
        granted: Rows = np.minimum(wanted, 1)
        budget = self._config.max_num_batched_tokens - int(granted.sum())
        prefilling = np.flatnonzero(wanted > 1)
        ranks = sorted(prefilling.tolist(), key=lambda i: self._table.sequence(int(rows[i])).order)
        for i in ranks:
            granted[i] += min(int(wanted[i]) - 1, budget)
            budget -= int(granted[i]) - 1
        return granted

    def _grow_tables(self) -> None:
        """Gives a block to each row that needs one, first in order first, preempting the last in order."""
        short = [self._table.sequence(row) for row in self._table.rows_short_of_blocks().tolist()]
        for sequence in sorted(short, key=_order):
            while sequence.row is not None and not self._blocks.num_free:
                self._preempt(max(self._table.sequences, key=_order))
            if sequence.row is not None:
                self._table.append_blocks(sequence.row, self._blocks.allocate(1))

    def _preempt(self, sequence: Sequence) -> None:
        self._blocks.release(self._table.detach(sequence))
        self.add(sequence)
        self.num_preemptions += 1

    def _admit(self, budget: int) -> Iterator[int]:
        """Admits from the head of the queue and yields the tokens granted to each; nobody jumps the head."""
        while self._waiting and budget > 0 and self._table.has_room:
            granted = self._try_admit(self._waiting[0], budget)
            if not granted:
                return
            self._waiting.pop(0)
            budget -= granted
            yield granted

    def _try_admit(self, sequence: Sequence, budget: int) -> int:
        """Tokens granted to the sequence now that it runs, or 0 if it has to wait."""
        shared = self._blocks.lookup(self._hash_chain(sequence))
        tail = self._find_tail(sequence, len(shared))
        num_cached = len(shared) * self._blocks.block_size if tail is None else sequence.num_tokens - 1
        left = sequence.num_tokens - num_cached
        wanted = self._blocks.blocks_for(sequence.num_tokens) - len(shared)
        fits_budget = left <= budget or self._config.enable_chunked_prefill
        if not fits_budget or wanted + self._reserve() > self._blocks.num_available(shared):
            return 0
        self._blocks.share(shared)
        own = self._blocks.allocate(wanted)
        if tail is not None:
            self._copies.append((tail, own[0]))
        self._table.attach(sequence, shared + own, num_cached)
        self._count_hits(sequence, num_cached)
        granted = min(left, budget)
        self._register_filled(np.array([sequence.row]), np.array([granted]))
        return granted

    def _find_tail(self, sequence: Sequence, num_shared: int) -> int | None:
        """The block where completion 0 keeps the end of the prompt that no full block holds, if there is one.

        Both go on writing there, each in a copy of its own.
        """
        first, num_before = sequence.first, sequence.num_tokens - 1  # the last token's logits are needed
        if first is None or first.row is None or sequence.num_tokens > sequence.num_prompt_tokens:
            return None
        if self._table.num_computed[first.row] < num_before:  # it has been preempted, and computes again
            return None
        if num_shared != num_before // self._blocks.block_size or not num_before % self._blocks.block_size:
            return None
        return int(self._table.block_tables[first.row, num_shared])

    def _reserve(self) -> int:
        """Blocks kept for the running sequences' next tokens, lest an admission be undone a step later."""
        return min(len(self._table), self._blocks.num_blocks // 16)

    def _count_hits(self, sequence: Sequence, num_cached: int) -> None:
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached_tokens = num_cached
            self.num_lookup_tokens += sequence.num_tokens
            self.num_hit_tokens += num_cached

    def _hash_chain(self, sequence: Sequence) -> Iterator[bytes]:
        """Hashes of a waiting sequence's full blocks, but for the tokens whose logits are needed."""
        if sequence.has_unscored_prompt:
            return
        for i in range((sequence.num_tokens - 1) // self._blocks.block_size):
            yield self._block_hash(sequence, i, sequence.token_ids)

    def _register_filled(self, rows: Rows, granted: Rows) -> None:
        """Makes the blocks that the granted tokens fill findable, even for those admitted to the same step.

        A layer stores the keys and values of all the step's tokens before any of them attends. A block with a
        token that is not known yet waits for `reveal`.
        """
        before = self._table.num_computed[rows]
        size = self._table.block_size
        known = self._table.num_tokens[rows] - self._table.num_unknown[rows]
        first, end = before // size, np.minimum(before + granted, known) // size
        for i in np.flatnonzero(first < end).tolist():
            self._register(int(rows[i]), int(first[i]), int(end[i]))

    def _register(self, row: int, first: int, end: int) -> None:
        sequence = self._table.sequence(row)
        for i in range(first, end):
            digest = self._block_hash(sequence, i, self._table.token_ids[row])
            self._blocks.register(int(self._table.block_tables[row, i]), digest)

    def _block_hash(self, sequence: Sequence, i: int, token_ids: NDArray[np.int32]) -> bytes:
        hashes = sequence.block_hashes
        if i == len(hashes):
            size = self._blocks.block_size
            parent = hashes[-1] if hashes else self._root(sequence)
            hashes.append(hash_block(parent, token_ids[i * size : (i + 1) * size]))
        return hashes[i]

    def _root(self, sequence: Sequence) -> bytes:
        """Where the hash chain starts: unless prefixes are shared, in a place of the request's own."""
        request = sequence.request
        salt = f"salt {request.cache_salt}" if self._share_prefixes else f"request {sequence.order[1]}"
        return blake2b(salt.encode(), digest_size=16).digest()


def _order(sequence: Sequence) -> tuple[float, int, int]:
    return sequence.order
