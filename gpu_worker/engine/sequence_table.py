"""The running sequences as columns of numbers, one row each, so that a step is arithmetic and not a loop.

    row        token_ids [N, max_model_len]         num_tokens  num_computed   block_tables [N, M]
    num_blocks
     0    prompt … completion … (unused)               70           69           5  9 (unused)          2
     1    prompt ……………… (unused)                      900          512           …                     15

`num_tokens - num_computed` tokens of a row wait for their keys and values: 1 while it decodes, more while it
prefills. A row's last `num_unknown` tokens have been sampled on the device and not read yet: their ids are
NO_TOKEN here. A row is free, or belongs to one sequence from its admission to its end or preemption.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpu_worker.engine.sequence import Sequence

Rows = NDArray[np.int64]

NO_TOKEN = -1


class SequenceTable:
    """Room for `max_num_seqs` running sequences of at most `max_model_len` tokens."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.block_size = block_size
        self.token_ids = np.zeros((max_num_seqs, max_model_len), np.int32)
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_computed = np.zeros(max_num_seqs, np.int64)
        self.num_unknown = np.zeros(max_num_seqs, np.int64)
        self.max_total_tokens = np.zeros(max_num_seqs, np.int64)
        self.min_total_tokens = np.zeros(max_num_seqs, np.int64)
        self.block_tables = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.num_blocks = np.zeros(max_num_seqs, np.int64)
        self.stop_ids = np.full((max_num_seqs, 1), NO_TOKEN, np.int64)
        self._sequences: list[Sequence | None] = [None] * max_num_seqs
        self._running: dict[int, Sequence] = {}
        self._free_rows = list(range(max_num_seqs))[::-1]
        self._rows: Rows | None = None

    def __len__(self) -> int:
        return len(self._running)

    @property
    def has_room(self) -> bool:
        return bool(self._free_rows)

    @property
    def rows(self) -> Rows:
        """Rows in use, oldest first."""
        if self._rows is None:
            self._rows = np.fromiter(self._running, np.int64, len(self._running))
        return self._rows

    @property
    def unfinished_rows(self) -> Rows:
        """Those that are not as long as they may become, oldest first."""
        return self.rows[self.num_tokens[self.rows] < self.max_total_tokens[self.rows]]

    @property
    def sequences(self) -> list[Sequence]:
        """The running sequences, oldest first."""
        return list(self._running.values())

    def sequence(self, row: int) -> Sequence:
        sequence = self._sequences[row]
        assert sequence is not None, f"row {row} is free"
        return sequence

    def attach(self, sequence: Sequence, blocks: list[int], num_computed: int) -> None:
        """Gives a sequence a row, its blocks and the count of its tokens that these already hold."""
        row = self._free_rows.pop()
        sequence.row = row
        self._sequences[row] = self._running[row] = sequence
        self._rows = None
        self.token_ids[row, : sequence.num_tokens] = sequence.token_ids
        self.num_tokens[row] = sequence.num_tokens
        self.num_prompt_tokens[row] = sequence.num_prompt_tokens
        self.num_computed[row] = num_computed
        self.num_unknown[row] = 0
        self.max_total_tokens[row] = sequence.max_total_tokens
        self.min_total_tokens[row] = sequence.num_prompt_tokens + sequence.request.params.min_tokens
        self.num_blocks[row] = 0
        self.append_blocks(row, blocks)
        self._set_stop_ids(row, sequence.stop_ids)

    def detach(self, sequence: Sequence) -> list[int]:
        """Frees a sequence's row, saves its known tokens, and returns the blocks that it held."""
        assert sequence.row is not None
        row = sequence.row
        sequence.row = None
        sequence.token_ids = self.token_ids[row, : self.num_tokens[row] - self.num_unknown[row]].copy()
        self._sequences[row] = None
        del self._running[row]
        self._free_rows.append(row)
        self._rows = None
        return self.blocks_of(row)

    def blocks_of(self, row: int) -> list[int]:
        blocks: list[int] = self.block_tables[row, : self.num_blocks[row]].tolist()
        return blocks

    def append_blocks(self, row: int, blocks: list[int]) -> None:
        start = int(self.num_blocks[row])
        self.block_tables[row, start : start + len(blocks)] = blocks
        self.num_blocks[row] = start + len(blocks)

    def rows_short_of_blocks(self) -> Rows:
        """Rows whose tokens do not all have a slot."""
        rows = self.unfinished_rows
        return rows[self.num_tokens[rows] > self.num_blocks[rows] * self.block_size]

    def append_unknown(self, rows: Rows) -> None:
        """Appends to each row the token that is being sampled."""
        self.token_ids[rows, self.num_tokens[rows]] = NO_TOKEN
        self.num_tokens[rows] += 1
        self.num_unknown[rows] += 1

    def reveal(self, rows: Rows, lengths: Rows, token_ids: Rows) -> None:
        """Says what the tokens are that brought the rows to these lengths."""
        self.token_ids[rows, lengths - 1] = token_ids
        self.num_unknown[rows] -= 1

    def hits_stop(self, rows: Rows, token_ids: Rows) -> NDArray[np.bool_]:
        """Whether each row's new token ends it."""
        hits: NDArray[np.bool_] = (self.stop_ids[rows] == token_ids[:, None]).any(axis=1)
        return hits

    def _set_stop_ids(self, row: int, stop_ids: tuple[int, ...]) -> None:
        missing = len(stop_ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, missing)), constant_values=NO_TOKEN)
        self.stop_ids[row] = NO_TOKEN
        self.stop_ids[row, : len(stop_ids)] = stop_ids
