"""From rows of the sequence table to the tensors of a step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker.engine.sampler import Drawn
from gpu_worker.engine.scheduler import ScheduledStep
from gpu_worker.engine.sequence_table import Rows, SequenceTable
from gpu_worker.layers.batch import Batch


class BatchBuilder:
    """Reads the table; one gather per tensor, whatever the number of sequences."""

    def __init__(self, table: SequenceTable, device: torch.device) -> None:
        self._table = table
        self._device = device

    def build(self, step: ScheduledStep, drawn: Drawn | None = None) -> Batch:
        """The step's tokens, the tokens of a sequence side by side; those not known yet come from `drawn`."""
        table, rows, lens = self._table, step.rows, step.num_scheduled
        ends = np.cumsum(lens)
        starts = ends - lens
        rows_T = np.repeat(rows, lens)
        positions_T = np.arange(ends[-1]) + np.repeat(table.num_computed[rows] - starts, lens)
        block_T, offset_T = np.divmod(positions_T, table.block_size)
        input_ids_T = self._to(table.token_ids[rows_T, positions_T].astype(np.int64))
        if drawn is not None:
            self._feed(input_ids_T, drawn, rows, ends - 1)
        return Batch(
            input_ids_T=input_ids_T,
            positions_T=self._to(positions_T),
            slot_mapping_T=self._to(
                table.block_tables[rows_T, block_T] * np.int64(table.block_size) + offset_T
            ),
            block_tables_SM=self._to(table.block_tables[rows, : table.num_blocks[rows].max()]),
            cu_seqlens_q=self._to(np.append(0, ends).astype(np.int32)),
            context_lens_S=self._to((table.num_computed[rows] + lens).astype(np.int32)),
            max_query_len=int(lens.max()),
            sample_rows_S=self._to(ends - 1),
        )

    def _feed(self, input_ids_T: torch.Tensor, drawn: Drawn, rows: Rows, last: Rows) -> None:
        """Puts drawn tokens where they are read, without a look at them."""
        waits = np.flatnonzero(self._table.num_unknown[rows])
        source = np.zeros(len(self._table.num_unknown), np.int64)
        source[drawn.rows] = np.arange(len(drawn.rows))
        token_ids = drawn.token_ids_S[self._to(source[rows[waits]])]
        input_ids_T.index_copy_(0, self._to(last[waits]), token_ids)

    def _to(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
