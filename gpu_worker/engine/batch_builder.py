"""From rows of the sequence table to the tensors of a step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker.engine.scheduler import ScheduledStep
from gpu_worker.engine.sequence_table import SequenceTable
from gpu_worker.layers.batch import Batch


class BatchBuilder:
    """Reads the table; one gather per tensor, whatever the number of sequences."""

    def __init__(self, table: SequenceTable, device: torch.device) -> None:
        self._table = table
        self._device = device

    def build(self, step: ScheduledStep) -> Batch:
        """The step's tokens, the tokens of a sequence side by side."""
        table, rows, lens = self._table, step.rows, step.num_scheduled
        ends = np.cumsum(lens)
        starts = ends - lens
        rows_T = np.repeat(rows, lens)
        positions_T = np.arange(ends[-1]) + np.repeat(table.num_computed[rows] - starts, lens)
        block_T, offset_T = np.divmod(positions_T, table.block_size)
        return Batch(
            input_ids_T=self._to(table.token_ids[rows_T, positions_T].astype(np.int64)),
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

    def _to(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
