"""Decode steps as CUDA graphs: captured once for a few batch sizes, replayed with the rest padded.

    sequences   0 … n-1 | n … size-1          size: the smallest captured one that holds n
    slot         real   |  -1                 what a padding row computes is stored nowhere
    context_len  real   |   1                 and read by nobody

A graph reads and writes fixed addresses, so a step first copies its tensors into the captured buffers.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

import torch

from gpu_worker.engine.runner import Model
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache

PADDING_SLOT = -1

logger = logging.getLogger(__name__)


class Capture(Protocol):
    """Records what a function launches; the result launches it again."""

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]: ...


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then every eighth: at most seven rows are padding beyond the first few sizes."""
    sizes = [size for size in (1, 2, 4) if size < max_num_seqs]
    return [*sizes, *range(8, max_num_seqs, 8), max_num_seqs]


class CudaCapture:
    """torch's CUDA graphs, all in one memory pool: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # compiles kernels and fills caches, which may not happen while recording
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        return graph.replay


class DecodeGraphs:
    """The captured sizes and the buffers that they share."""

    def __init__(
        self, model: Model, kv_cache: KVCache, max_num_seqs: int, max_blocks: int, device: torch.device
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._sizes = graph_sizes(max_num_seqs)
        self._replays: dict[int, Callable[[], None]] = {}
        self._logits_SV: torch.Tensor | None = None  # of all sizes: only one of them runs at a time
        ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        every = torch.arange(max_num_seqs + 1, dtype=torch.int64, device=device)
        self._buffers = Batch(
            input_ids_T=ids,
            positions_T=ids.clone(),
            slot_mapping_T=torch.full_like(ids, PADDING_SLOT),
            block_tables_SM=torch.zeros((max_num_seqs, max_blocks), dtype=torch.int32, device=device),
            cu_seqlens_q=every.int(),
            context_lens_S=torch.ones(max_num_seqs, dtype=torch.int32, device=device),
            max_query_len=1,
            sample_rows_S=every[:-1],
        )

    @torch.inference_mode()
    def capture(self, capture: Capture) -> None:
        """Captures every size, the largest first, so that the others fit into its memory."""
        for size in reversed(self._sizes):
            self._replays[size] = capture(lambda size=size: self._run(size))  # type: ignore[misc]
        logger.info(
            "captured CUDA graphs for decode batches of %d sizes up to %d", len(self._sizes), self._sizes[-1]
        )

    def can_run(self, batch: Batch) -> bool:
        return batch.max_query_len == 1 and batch.num_sequences <= self._sizes[-1]

    def run(self, batch: Batch) -> torch.Tensor:
        """float32 logits [S, V] of a decode step; overwritten by the next."""
        size = self._sizes[bisect_left(self._sizes, batch.num_sequences)]
        self._fill(batch, size)
        self._replays[size]()
        assert self._logits_SV is not None
        return self._logits_SV[: batch.num_sequences]

    def _fill(self, batch: Batch, size: int) -> None:
        num, buffers = batch.num_sequences, self._buffers
        buffers.input_ids_T[:num] = batch.input_ids_T
        buffers.positions_T[:num] = batch.positions_T
        buffers.slot_mapping_T[:num] = batch.slot_mapping_T
        buffers.block_tables_SM[:num, : batch.block_tables_SM.shape[1]] = batch.block_tables_SM
        buffers.context_lens_S[:num] = batch.context_lens_S
        buffers.positions_T[num:size] = 0
        buffers.slot_mapping_T[num:size] = PADDING_SLOT
        buffers.context_lens_S[num:size] = 1

    def _run(self, size: int) -> None:
        batch = self._slice(size)
        hidden_SD = self._model.forward(batch, self._kv_cache)
        logits_SV = self._model.logits(hidden_SD)
        if self._logits_SV is None:  # the first run, of the largest size, makes what all recorded ones write
            self._logits_SV = torch.empty_like(logits_SV)
        self._logits_SV[:size].copy_(logits_SV)

    def _slice(self, size: int) -> Batch:
        buffers = self._buffers
        return Batch(
            input_ids_T=buffers.input_ids_T[:size],
            positions_T=buffers.positions_T[:size],
            slot_mapping_T=buffers.slot_mapping_T[:size],
            block_tables_SM=buffers.block_tables_SM[:size],
            cu_seqlens_q=buffers.cu_seqlens_q[: size + 1],
            context_lens_S=buffers.context_lens_S[:size],
            max_query_len=1,
            sample_rows_S=buffers.sample_rows_S[:size],
        )
